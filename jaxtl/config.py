"""The experiment: frozen dataclasses, single-field overrides, and their JSON form.

An experiment is a value. `experiments/NAME.py` returns one, `--set path.to.field=value` replaces single fields,
and the result, written to the run folder as `experiment.json`, is enough to repeat the run.
"""

import ast
import dataclasses
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from jaxtl.errors import UserError, suggest
from jaxtl.training import freeze as freezing

Precision = Literal["float32", "bfloat16"]

RANDOM = "random"  # model.weights where there are none


@dataclasses.dataclass(frozen=True)
class Head:
    """What is put on the backbone.

    Attributes:
        kind: `mlp` (dense, ReLU, dropout, dense: the study's image head), `fc` (one dense layer), `bigru` (a
            bidirectional GRU over all tokens, then a dense layer) or `mlm` (none: BERT's own masked language
            modelling). Two classes share one output node (sigmoid), more have one each (softmax).
        reads: what the head takes from the backbone. Transformers: `cls` (the class token after the last layer),
            `cls_patches` (class token and mean of the patches), `logits` (the pretrained classifier's output,
            DeiT: the mean of its two heads). VGG19: `flatten` (the last feature map), or `logits`. BERT: `cls`,
            `pooled` (its pooler's output), `sequence` (every token, for `bigru`), `masked` (the hidden tokens, for
            `mlm`).
        hidden: width of the hidden layer of `mlp`, and of each direction of `bigru`.
        dropout: dropout rate before the last dense layer.
        init: what the output layer starts from. `zero` suits pretrained features; `random` a backbone that is
            trained from scratch, to which a zero layer hands no gradient.
    """

    kind: Literal["mlp", "fc", "bigru", "mlm"] = "mlp"
    reads: Literal["cls", "cls_patches", "logits", "flatten", "pooled", "sequence", "masked"] = "cls"
    hidden: int = 256
    dropout: float = 0.5
    init: Literal["zero", "random"] = "zero"


@dataclasses.dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        preset: architecture and size, one of `jaxtl.models.presets.PRESETS`; or `from_weights`: family and size
            are those of the `config.json` beside the weights.
        weights: a Hugging Face repo id, a local folder in that layout, a single checkpoint file, a finished run
            folder of jaxtl, `random`, or (in a suite) `suite:NAME` for the run of an earlier member.
        image_size: side of the square image the model sees, in pixels; without meaning for text.
        head: what reads the backbone.
    """

    preset: str
    weights: str = RANDOM
    image_size: int = 224
    head: Head = Head()


@dataclasses.dataclass(frozen=True)
class Images:
    """Images: where they come from and how they are prepared.

    Attributes:
        source: `tfds`, `folder` (one folder a class), `digits` (the 8x8 images that scikit-learn ships), or
            `auto`: what `dir` holds, tfds where `dir` is empty.
        name: data set name, for tfds.
        dir: the tfds data dir, or the image folder. Empty: the tfds default.
        download: let tfds fetch a data set that is not there.
        train_split: name of the training split, for tfds (slices as in `train[:80%]` too).
        eval_split: name of the held-out split. Empty: tfds, `test` or `validation`; folders, `val`, `validation`,
            `dev` or `test`, in this order. `train`, or none there: the held-out part is drawn from the training
            split by `eval_fraction`.
        train_size, eval_size: draw this many examples, stratified by class; None takes all.
        eval_fraction: the part split off by seed for evaluation where the source has no held-out split.
        subset_seed: fixes which examples are drawn. Apart from `train.seed`, so that repetitions of a run
            see the same examples.
        classes: keep these classes only, by name, numbered in this order; empty keeps all.
        resize: `stretch` to a square, or `crop`: shorter side to size, then the centre.
        scale: pixel values given to the model: `unit` [0, 1], `half` [-1, 1] (mean and deviation 0.5), or
            `imagenet` (ImageNet mean and deviation per channel).
        augment: `none`, `flip` (left-right), or `crop_flip` (random resized crop and flip), drawn inside the
            compiled step.
    """

    source: Literal["auto", "tfds", "folder", "digits"] = "auto"
    name: str = ""
    dir: str = ""
    download: bool = True
    train_split: str = "train"
    eval_split: str = ""
    train_size: int | None = None
    eval_size: int | None = None
    eval_fraction: float = 0.2
    subset_seed: int = 0
    classes: tuple[str, ...] = ()
    resize: Literal["stretch", "crop"] = "stretch"
    scale: Literal["unit", "half", "imagenet"] = "unit"
    augment: Literal["none", "flip", "crop_flip"] = "none"


@dataclasses.dataclass(frozen=True)
class Text:
    """Texts: where they come from and how they are prepared.

    Files are CSV, JSON lines (`.jsonl`, `.json`), Parquet, or `.txt` with a text on each line, without labels.

    Attributes:
        name: a published data set of `jaxtl.data.published`, for its files' names and addresses; empty for files of
            your own.
        dir: the folder that the paths below are in. Empty: the current one; with `name`, a cache folder that the
            files are fetched into once.
        train: paths of the training texts, one or more. Empty, with `name`: all its splits, by their names.
        validation: path of the texts that the model is selected on. Empty: split off from the training texts by
            `eval_fraction`, stratified.
        test: path of the texts looked at once, at the end. Empty: there are none.
        text_column: name of the column that holds the text.
        label_column: name of the column that holds the class, a string or a number. Empty: texts without labels.
        download: whether the files of a published set may be fetched.
        tokenizer: folder or repository of the tokenizer. Empty: the one beside the weights.
        max_length: word pieces that are kept of a text, the special ones included.
        buckets: number of lengths, chosen to fit the texts, that batches are filled up to; each is compiled once. None:
            as many as pay for their compilation, few for few texts.
        mask_rate: share of the word pieces that masked language modelling hides.
        train_size, eval_size: draw this many examples, stratified by class; None takes all.
        eval_fraction: the part split off for validation where there is no file for it.
        subset_seed: fixes which examples are drawn, apart from `train.seed`.
        classes: keep these classes only, numbered in this order; empty keeps all, in alphabetical order.
    """

    name: str = ""
    dir: str = ""
    train: tuple[str, ...] = ()
    validation: str = ""
    test: str = ""
    text_column: str = "text"
    label_column: str = "label"
    download: bool = True
    tokenizer: str = ""
    max_length: int = 128
    buckets: int | None = None
    mask_rate: float = 0.15
    train_size: int | None = None
    eval_size: int | None = None
    eval_fraction: float = 0.2
    subset_seed: int = 0
    classes: tuple[str, ...] = ()


Data = Images | Text


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser.

    Attributes:
        name: `adam`, `adamw` (weight decay on kernels only) or `sgd` (Nesterov momentum 0.9).
        learning_rate: the peak rate.
        width: the model width that `learning_rate` was chosen for; a model of another width learns at a rate in inverse
            proportion, as hidden weights under Adam should (Yang et al. 2022, arXiv:2203.03466, table 3), so that one
            recipe serves backbones of all sizes. 0: the rate as it is.
        schedule: after the warm-up, `constant`, or `linear` or `cosine` decay to zero over the run.
        warmup: fraction of all steps with a linearly rising rate.
        weight_decay: for `adamw`.
        clip_norm: clip the global norm of the trainable gradients to this; 0 is off.
        multipliers: (group, factor) pairs: learning rate of a freeze-rule group relative to `learning_rate`.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-4
    width: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    multipliers: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Train:
    """The loop.

    Attributes:
        epochs: passes over the training examples.
        max_steps: stop after this many steps, evaluate and finish; None is no limit.
        batch_size, eval_batch_size: examples a step, over all devices.
        seed: fixes data order, initialisation, dropout and augmentation.
        precision: compute dtype of the matrix products; parameters, normalisation and softmax stay float32.
        accumulate_steps: a step goes through its batch in so many parts, one after the other, and adds up their
            gradients: less memory, the same step but for dropout and augmentation, which every part draws anew.
        remat: `blocks` keeps of each trained stage only what enters it and computes the rest again when its gradient
            is needed: on GPU and TPU less memory, for a third more time. Same results.
        eval_every: epochs between evaluations; the last one is always evaluated.
        select: which of the evaluated parameters are kept: the `last`, or the `best` on the held-out examples (by
            accuracy, then loss). With `best`, the held-out figures are those of a choice: test on other examples.
        log_every: steps between training lines in metrics.jsonl.
        on_nonfinite: what to do when the loss or a gradient is not finite: `stop` the run, or `skip` that step's update
            and go on. Either way the parameters stay what they were before it.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 64
    eval_batch_size: int = 64
    seed: int = 0
    precision: Precision = "float32"
    accumulate_steps: int = 1
    remat: Literal["none", "blocks"] = "none"
    eval_every: int = 1
    select: Literal["last", "best"] = "last"
    log_every: int = 10
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is computed once, and what not at all.

    Attributes:
        cache: keep the activations after the frozen prefix: `auto` where it pays and fits, `on` insists, `off`.
        cache_dir: folder they are kept in for the runs to come, which share them where weights, data and precision are
            the same. Empty: `activations` in jaxtl's cache folder.
        cache_budget_gb: memory that they may take, in gigabytes; above it they are read from the files in `cache_dir`.
        cache_disk_gb: disk space that all files in `cache_dir` may take; those used longest ago make room. 0: none.
        cache_dtype: what they are kept in: `auto`, as they are computed, which changes no result; `bfloat16` halves
            the space of a float32 run.
        cached_views: with random augmentation nothing can be kept, unless of so many views of each image, drawn once:
            epoch 1 sees the first, and after the last it begins again. 0: new ones every epoch, nothing kept.
            Refused where they cannot be kept.
        prune: of the last block, compute only the tokens that the head reads. Same results, but for what dropout in
            that block draws, if it learns.
    """

    cache: Literal["auto", "on", "off"] = "auto"
    cache_dir: str = ""
    cache_budget_gb: float = 4.0
    cache_disk_gb: float = 50.0
    cache_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cached_views: int = 0
    prune: bool = True


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved while a run goes on, so that the same command goes on where it was interrupted.

    Attributes:
        every_minutes: time between checkpoints; 0: none by the clock. One is saved in any case when the run is
            interrupted by Ctrl-C or SIGTERM, and after the last step.
        every_steps: training steps between checkpoints; 0: none by their number.
        keep: checkpoints that are kept, the newest ones.
        save_frozen: keep the frozen parameters in the run folder too, which can then be used without the weights it
            started from.
    """

    every_minutes: float = 10.0
    every_steps: int = 0
    keep: int = 2
    save_frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a run is divided among devices. The result is the same up to rounding.

    Attributes:
        devices: how many take part, each with an equal part of every batch; None: all that there are.
        fsdp: among how many of them parameters, optimiser state and gradients are divided, instead of every device
            having all of them: less memory, more communication. 1: among none. It must divide the devices.
    """

    devices: int | None = None
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run, whole: everything but the folder it writes to.

    Attributes:
        freeze: ordered rules (pattern, group), see `jaxtl.training.freeze`; group None is frozen.
        reported: figures of the original study, to compare with, named as in result.json (`accuracy`, `f1/real`,
            `confusion/fake/real`: true class, predicted class); empty where there are none.
    """

    model: Model
    data: Data
    freeze: freezing.Rules = freezing.train_all()
    optim: Optim = Optim()
    train: Train = Train()
    plan: Plan = Plan()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel = Parallel()
    reported: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Suite:
    """Experiments that belong together, run in order and compared at the end.

    A member may start from an earlier one's trained weights: `model.weights="suite:NAME"`.
    """

    members: tuple[tuple[str, Experiment], ...]


# --- overrides -------------------------------------------------------------------------------------------


def override(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """Returns the experiment with each `path.to.field=value` applied, in order.

    Raises:
        UserError: no '=', an unknown field (the nearest and all valid ones are named), a value of the wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as path.to.field=value")
        experiment = _replace(experiment, path.strip().split("."), text.strip(), path.strip())
    return experiment


def _replace(node: Any, path: list[str], text: str, full: str) -> Any:
    hints = typing.get_type_hints(type(node))
    name, rest = path[0], path[1:]
    if name not in hints:
        prefix = full[: len(full) - len(".".join(path))]
        valid = ", ".join(prefix + field for field in hints)
        raise UserError(f"--set {full}: there is no such field{suggest(name, hints)}; valid here: {valid}")
    value = getattr(node, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            fields = ", ".join(f"{full}.{field.name}" for field in dataclasses.fields(value))
            raise UserError(f"--set {full}: this is a group of fields; set one of {fields}")
        return dataclasses.replace(node, **{name: _replace(value, rest, text, full)})
    if rest:
        raise UserError(f"--set {full}: {'.'.join(full.split('.')[: -len(rest)])} has no fields below it")
    try:
        parsed = _parse(text, hints[name])
    except (ValueError, SyntaxError) as error:
        raise UserError(f"--set {full}={text}: {error}") from None
    return dataclasses.replace(node, **{name: parsed})


def _parse(text: str, hint: Any) -> Any:
    """Returns `text` as a value of type `hint`; raises ValueError saying what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"expected one of {', '.join(args)}{suggest(text, args)}")
        return text
    if origin is types.UnionType:  # of a single field, every union is `X | None`
        return None if text.lower() in ("none", "null", "all") else _parse(text, args[0])
    if hint is bool:
        choices = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in choices:
            raise ValueError("expected true or false")
        return choices[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"expected {'a whole number' if hint is int else 'a number'}") from None
    if hint is str:
        return text
    if hint == freezing.Rules:
        return freezing.parse(text)
    if hint == tuple[str, ...]:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    try:
        return decode(ast.literal_eval(text or "()"), hint)
    except (ValueError, SyntaxError, TypeError):
        raise ValueError('expected pairs, as in (("head", 10.0),)') from None


# --- validation ------------------------------------------------------------------------------------------

_POSITIVE = "greater than zero", lambda value: 0 < value < math.inf
_FRACTION = "at least 0 and below 1", lambda value: 0 <= value < 1
_NOT_NEGATIVE = "zero or more", lambda value: 0 <= value < math.inf
_SEED = "from 0 to 4294967295", lambda value: 0 <= value < 2**32

_CHECKS = {
    "model.weights": ("a path, a repository or random", bool),
    "model.image_size": ("from 1 to 4096", lambda value: 1 <= value <= 4096),
    "model.head.hidden": _POSITIVE,
    "model.head.dropout": _FRACTION,
    "data.train_size": _POSITIVE,
    "data.eval_size": _POSITIVE,
    "data.eval_fraction": ("above 0 and below 1", lambda value: 0 < value < 1),
    "data.subset_seed": _SEED,
    "data.max_length": ("at least 3", lambda value: value >= 3),  # a piece between the two special ones
    "data.buckets": ("from 1 to 16", lambda value: 1 <= value <= 16),
    "data.mask_rate": ("above 0 and below 1", lambda value: 0 < value < 1),
    "optim.learning_rate": _POSITIVE,
    "optim.width": _NOT_NEGATIVE,
    "optim.warmup": _FRACTION,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.clip_norm": _NOT_NEGATIVE,
    "optim.multipliers": (
        "greater than zero each",
        lambda pairs: all(0 < factor < math.inf for _, factor in pairs),
    ),
    "plan.cache_budget_gb": _NOT_NEGATIVE,
    "plan.cache_disk_gb": _NOT_NEGATIVE,
    "plan.cached_views": _NOT_NEGATIVE,
    "checkpoint.every_minutes": _NOT_NEGATIVE,
    "checkpoint.every_steps": _NOT_NEGATIVE,
    "checkpoint.keep": _POSITIVE,
    "parallel.devices": _POSITIVE,
    "parallel.fsdp": _POSITIVE,
    "train.accumulate_steps": _POSITIVE,
    "train.epochs": _POSITIVE,
    "train.max_steps": _POSITIVE,
    "train.batch_size": _POSITIVE,
    "train.eval_batch_size": _POSITIVE,
    "train.seed": _SEED,
    "train.eval_every": _POSITIVE,
    "train.log_every": _POSITIVE,
}


def checked(experiment: Experiment, where: str) -> Experiment:
    """Returns the experiment with every field of its declared type: lists as tuples, whole numbers as floats.

    Python does not hold a file to the types of a dataclass: `Optim("adamW")` would otherwise be found out late.

    Raises:
        UserError: a field of another type; `where` says where it was written.
    """
    try:
        return decode(dataclasses.asdict(experiment), Experiment)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def validate(experiment: Experiment) -> None:
    """Checks every field's range; raises one UserError that lists all fields out of range."""
    wrong = []
    for path, (rule, holds) in _CHECKS.items():
        value: Any = experiment
        for name in path.split("."):
            value = getattr(value, name, None)  # images and text have fields of their own
        if value is not None and not holds(value):  # NaN fails every comparison
            wrong.append(f"{path}={value} must be {rule}")
    settings = experiment.train
    if settings.accumulate_steps > 0 and settings.batch_size % settings.accumulate_steps:
        wrong.append(
            f"train.batch_size={settings.batch_size} must be a multiple of "
            f"train.accumulate_steps={settings.accumulate_steps}"
        )
    if wrong:
        raise UserError("; ".join(wrong))


# --- JSON ------------------------------------------------------------------------------------------------


def to_json(experiment: Experiment) -> str:
    """Returns the experiment as indented JSON; `from_json` is the inverse."""
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str, where: str) -> Experiment:
    """Reads what `to_json` wrote. `where` names the file in errors.

    Raises:
        UserError: not JSON, or not an experiment.
    """
    try:
        return decode(json.loads(text), Experiment)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is not an experiment of this version of jaxtl: {error}") from None


def differences(a: Experiment, b: Experiment) -> list[str]:
    """Returns the paths of the fields in which two experiments differ."""
    return _differences(dataclasses.asdict(a), dataclasses.asdict(b), "")


def _differences(a: dict, b: dict, prefix: str) -> list[str]:
    paths = []
    for name in {**a, **b}:  # image and text experiments have different fields
        value, other = a.get(name), b.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            paths += _differences(value, other, f"{prefix}{name}.")
        elif value != other or (name in a) != (name in b):
            paths.append(prefix + name)
    return paths


def _decode_field(name: str, value: Any, hint: Any) -> Any:
    try:
        return decode(value, hint)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def decode(value: Any, hint: Any) -> Any:
    """Returns plain data (JSON, a Python literal) as a value of type `hint`; raises ValueError or TypeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        if not isinstance(value, dict):
            raise ValueError(f"{hint.__name__} must be an object")
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"{hint.__name__} has no field {', '.join(unknown)}")
        return hint(**{name: _decode_field(name, item, hints[name]) for name, item in value.items()})
    if origin is types.UnionType and all(map(dataclasses.is_dataclass, args)):  # told apart by their fields
        kinds = [kind for kind in args if isinstance(value, dict) and set(value) <= set(typing.get_type_hints(kind))]
        return decode(value, kinds[0] if kinds else args[0])
    if origin is types.UnionType:
        return None if value is None else decode(value, args[0])
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list, found {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(decode(item, args[0]) for item in value)
        if len(value) != len(args):
            raise ValueError(f"expected {len(args)} items, found {value!r}")
        return tuple(decode(item, kind) for item, kind in zip(value, args, strict=True))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{value!r} is none of {', '.join(args)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"expected {hint.__name__}, found {value!r}")
    return value
