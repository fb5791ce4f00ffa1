"""The network of an experiment: its architecture, stages and parameters, and the values they start from."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl import config, remote
from jaxtl.data import masking
from jaxtl.errors import UserError, suggest
from jaxtl.models import presets, stages
from jaxtl.progress import say
from jaxtl.training import checkpoint
from jaxtl.training.run import read_experiment, read_result
from jaxtl.weights import configs, convert, files, hub, tables

HEAD = "head"  # the stage that is ours; all before it is the backbone
TOKENIZER = "tokenizer"  # folder of a run


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without values.

    Attributes:
        config: the backbone's architecture.
        build: makes the module from random streams.
        structure: the module without its parameters.
        params: abstract parameters by path, backbone and head, in the order of the stages.
        stages: names in order, the head's last.
        input: abstract input of the model for one example of the largest size.
    """

    config: presets.Config
    build: Callable[[nnx.Rngs], stages.Staged]
    structure: nnx.GraphDef
    params: stages.Params
    stages: tuple[str, ...]
    input: Any


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its folder tells.

    Attributes:
        result: what its result.json holds.
        trained: the parameters it trained, by path.
    """

    folder: Path
    experiment: config.Experiment
    result: dict[str, Any]
    trained: stages.Params

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes it tells apart."""
        return tuple(self.result["classes"])

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width that its images were decoded to, before the compiled step; None of texts.

        Raises:
            UserError: the result does not say.
        """
        if isinstance(self.experiment.data, config.Text):
            return None
        try:
            height, width = map(int, self.result["image_shape"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / 'result.json'} does not say which size its images had, as those of this version of "
                "jaxtl do: run it again"
            ) from None
        return height, width


def network(experiment: config.Experiment, classes: int, weights: Path | None) -> Network:
    """Returns the network that an experiment describes.

    Args:
        experiment: model, precision, and the data for the size of an input.
        classes: number of classes to tell apart.
        weights: where the weights lie (see `locate`), None where they are random or not at hand. The architecture
            described beside them is used, and must be the preset's.

    Raises:
        UserError: an unknown preset, weights of another architecture, or parts that do not fit together.
    """
    model, data = experiment.model, experiment.data
    architecture, inputs = _architecture(model, weights), _input(experiment)
    try:
        build = presets.model(
            architecture,
            **dataclasses.asdict(model.head),
            classes=classes,
            inputs=inputs,
            precision=experiment.train.precision,
            prune=experiment.plan.prune,
        )
    except ValueError as error:
        size = f"data.max_length={data.max_length}" if isinstance(data, config.Text) else ""
        size = size or f"model.image_size={model.image_size}"
        raise UserError(
            f"{size}, model.head.kind={model.head.kind}, model.head.reads={model.head.reads}: {error}"
        ) from None
    structure, params, names = stages.abstract(build)
    order = {name: index for index, name in enumerate(names)}
    params = dict(sorted(params.items(), key=lambda item: (order[item[0].partition("/")[0]], item[0])))
    return Network(architecture, build, structure, params, names, inputs)


def locate(weights: str) -> Path | None:
    """Returns the file or folder of the weights, fetched from the Hub where need be; None for `random`.

    Raises:
        UserError: there is no such file, folder or repository, or it cannot be reached.
    """
    if weights == config.RANDOM:
        return None
    path = remote.local(weights, without=["checkpoints"])
    if path.exists():
        return path
    if not hub.is_repo_id(weights):
        raise UserError(f"model.weights={weights}: there is no such file or folder, and it is not a repository's name")
    try:
        return hub.fetch(weights)
    except UserError as error:
        raise UserError(f"model.weights={weights}: there is no such file or folder here, and {error}") from None


def tokenizer_folder(data: config.Text, weights: Path | None) -> Path:
    """Returns the folder that holds the tokenizer.

    Args:
        data: may name one.
        weights: where the weights lie, with a tokenizer beside them; None where they are random.

    Raises:
        UserError: it is nowhere to be found.
    """
    if data.tokenizer:
        folder = Path(data.tokenizer).expanduser()
        if not folder.is_dir():
            if folder.exists() or not hub.is_repo_id(data.tokenizer):
                raise UserError(f"data.tokenizer={data.tokenizer} is neither a folder nor a repository")
            folder = hub.fetch_description(data.tokenizer)  # weights, if it has any, are not wanted
        return folder / TOKENIZER if is_run(folder) else folder
    if weights is None:
        raise UserError("random weights have no tokenizer beside them; --set data.tokenizer=FOLDER_OR_REPO names one")
    if is_run(weights):
        return weights / TOKENIZER
    return weights if weights.is_dir() else weights.parent


def initial_params(net: Network, model: config.Model, weights: Path | None, seed: int) -> stages.Params:
    """Returns the values that training starts from: pretrained or random backbone, fresh head.

    Args:
        net: the network.
        model: the description it was made from.
        weights: where the weights lie, None for random ones.
        seed: fixes what is random.

    Raises:
        UserError: the weights cannot be read, or are not those of this network.
    """
    key = jax.random.key(seed)
    if weights is None:
        return stages.initialize(net.build, key, net.params)
    backbone = {path: leaf for path, leaf in net.params.items() if path.partition("/")[0] != HEAD}
    table = tables.table(net.config, top=presets.top(model.head.reads))
    if is_run(weights):
        loaded = _backbone(load_run(weights), backbone, table.optional)
    else:
        loaded = convert.read(table, files.Checkpoint(weights), backbone, str(weights))
    for stage in sorted({path.partition("/")[0] for path in backbone if path not in loaded}):
        say(f"{weights} holds no {stage}: it starts from random values")
    fresh = stages.initialize(net.build, key, [path for path in net.params if path not in loaded])
    return {**{path: jnp.asarray(value) for path, value in loaded.items()}, **fresh}


def load_run(folder: Path) -> FinishedRun:
    """Reads a finished run.

    Raises:
        UserError: it has not finished, or is damaged.
    """
    experiment, result = read_experiment(folder), read_result(folder)
    trained = checkpoint.read(folder / checkpoint.TRAINED, result["trained_sha256"])
    return FinishedRun(folder, experiment, result, trained)


def run_params(run: FinishedRun) -> tuple[Network, stages.Params]:
    """Returns the network of a finished run and all its parameters: what it started from, overlaid with what it saved.

    Raises:
        UserError: what it started from is gone, or not what it was then, by the digest in its result.
    """
    net = network(run.experiment, len(run.class_names), run.folder)
    frozen = {}
    if (run.folder / checkpoint.FROZEN).is_dir():
        frozen = checkpoint.read(run.folder / checkpoint.FROZEN, run.result["frozen_sha256"])
    elif len(run.trained) < len(net.params):
        weights = locate(run.experiment.model.weights)
        start = initial_params(net, run.experiment.model, weights, run.experiment.train.seed)
        frozen = {path: value for path, value in start.items() if path not in run.trained}
    if checkpoint.digest(frozen) != run.result["frozen_sha256"]:
        raise UserError(
            f"{run.folder}: its frozen parameters came from model.weights={run.experiment.model.weights}, which has "
            "changed since; put the weights of then back, or run it again"
        )
    return net, {**frozen, **run.trained}


def is_run(folder: Path) -> bool:
    """Whether the folder is that of a run."""
    return (folder / "experiment.json").is_file()


def _input(experiment: config.Experiment) -> Any:
    """Returns the abstract input of the model for one example of the largest size."""
    data, model = experiment.data, experiment.model
    if isinstance(data, config.Images):
        return jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    read = masking.read_positions(data.max_length, data.mask_rate)
    return stages.Sequence(
        jax.ShapeDtypeStruct((1, data.max_length), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, read), jnp.int32) if model.head.kind == "mlm" else None,
    )


def _architecture(model: config.Model, weights: Path | None) -> presets.Config:
    preset = None
    if model.preset != "from_weights":
        if model.preset not in presets.PRESETS:
            raise UserError(
                f"model.preset={model.preset}: there is no such preset{suggest(model.preset, presets.PRESETS)}; "
                f"there are {', '.join(presets.PRESETS)}, and from_weights"
            )
        preset = presets.PRESETS[model.preset]
    if weights is not None and is_run(weights):
        found = _run_architecture(weights)
    elif weights is not None and weights.is_dir():
        found = configs.read_config(weights)
    elif preset is None:
        where = f"{weights} is a single file" if weights else "there are none"
        raise UserError(f"model.preset=from_weights needs weights with a config.json beside them: {where}")
    else:
        return preset
    if preset is not None and (differing := presets.same_architecture(found, preset)):
        raise UserError(
            f"the weights in {weights} are not those of {model.preset}: {', '.join(differing)}; "
            "choose the preset they belong to, or --set model.preset=from_weights"
        )
    return found


def _run_architecture(folder: Path) -> presets.Config:
    try:
        return config.decode(read_result(folder)["architecture"], presets.Config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'result.json'} is damaged, or of another version of jaxtl: {error}") from None


def _backbone(run: FinishedRun, backbone: stages.Params, optional: Collection[str]) -> stages.Params:
    """Returns the backbone that a run trained, without those of the `optional` stages that it did not have."""
    _, params = run_params(run)
    had = {path.partition("/")[0] for path in params}
    wanted = {
        path: leaf
        for path, leaf in backbone.items()
        if (stage := path.partition("/")[0]) in had or stage not in optional
    }
    wrong = [path for path, leaf in wanted.items() if path not in params or params[path].shape != leaf.shape]
    if wrong:
        raise UserError(f"{run.folder} holds a run of another model: {', '.join(wrong[:3])} do not match")
    return {path: params[path] for path in wanted}
