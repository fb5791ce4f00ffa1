"""Where each parameter is found in the checkpoints of others: one table a family, read in both directions.

A row is `our path | their names | transform`. `{i}` counts blocks from 1, as our stages do, `{j}` from 0, as theirs.
A second name in a row is another publisher's; export writes the first. Names are without the prefix that
`transformers` puts before a backbone (`vit.`, `deit.`, ..).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

from jaxtl.models.bert import BertConfig
from jaxtl.models.presets import Config
from jaxtl.models.vgg import VGGConfig
from jaxtl.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout: `read` takes their array to ours, `write` ours to theirs."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda a: a, lambda a: a)
DENSE = Transform(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def _unfolded(channels: int) -> Transform:
    """OIHW <-> [H * W * I, O]: a convolution over the whole extent of its input, as a matrix."""

    def read(a: np.ndarray) -> np.ndarray:
        return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

    def write(a: np.ndarray) -> np.ndarray:
        side = int((a.shape[0] // channels) ** 0.5)
        return a.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)

    return Transform(read, write)


def _flattened(channels: int) -> Transform:
    """[O, I * H * W] <-> [H * W * I, O]: a dense layer after flattening channels first, or last."""
    unfolded = _unfolded(channels)

    def read(a: np.ndarray) -> np.ndarray:
        side = int((a.shape[1] // channels) ** 0.5)
        return unfolded.read(a.reshape(a.shape[0], channels, side, side))

    return Transform(read, lambda a: unfolded.write(a).reshape(a.shape[1], -1))


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter of ours and the (name, transform) pairs it may be found under."""

    path: str
    sources: tuple[tuple[str, Transform], ...]

    @property
    def stage(self) -> str:
        """The stage that the parameter belongs to."""
        return self.path.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of one model.

    Attributes:
        prefixes: what may stand before a source name.
        ignored: regular expressions of source names that are known and not used.
        unprefixed: stages whose names `transformers` writes without the prefix.
        optional: stages that a checkpoint may lack as a whole.
    """

    rows: tuple[Row, ...]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    unprefixed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def table(config: Config, *, top: str | None) -> Table:
    """Returns the table of a backbone with what is kept of its pretrained top, see `presets.backbone`."""
    return {ViTConfig: _vit, VGGConfig: _vgg, BertConfig: _bert}[type(config)](config, top)


def _dense(path: str, name: str) -> Iterator[Row]:
    yield Row(f"{path}/kernel", ((f"{name}.weight", DENSE),))
    yield Row(f"{path}/bias", ((f"{name}.bias", SAME),))


# --- ViT, DeiT, DINOv2: the names of Hugging Face's repositories -------------------------------------------

_EMBEDDINGS = (
    ("embeddings/class_token", "embeddings.cls_token", SAME),
    ("embeddings/position", "embeddings.position_embeddings", SAME),
    ("embeddings/patch/kernel", "embeddings.patch_embeddings.projection.weight", _unfolded(3)),
    ("embeddings/patch/bias", "embeddings.patch_embeddings.projection.bias", SAME),
)
_DISTILLATION = (("embeddings/distillation_token", "embeddings.distillation_token", SAME),)
_ATTENTION = (
    ("attention/query", "attention.attention.query"),
    ("attention/key", "attention.attention.key"),
    ("attention/value", "attention.attention.value"),
    ("attention/output", "attention.output.dense"),
)
_VIT_BLOCK = (("mlp/fc1", "intermediate.dense"), ("mlp/fc2", "output.dense"))
_VIT_NORMS = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"))
_DINOV2_BLOCK = (("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2"))
_DINOV2_GIANT_BLOCK = (("mlp/fc_in", "mlp.weights_in"), ("mlp/fc_out", "mlp.weights_out"))
_DINOV2_NORMS = (("norm1", "norm1"), ("norm2", "norm2"))
_LAYER_SCALES = (("layer_scale1", "layer_scale1.lambda1"), ("layer_scale2", "layer_scale2.lambda1"))
_CLASSIFIERS = {
    "vit": (("classifier/class_head", "classifier"),),
    "deit": (
        ("classifier/class_head", "cls_classifier"),
        ("classifier/distillation_head", "distillation_classifier"),
    ),
    "dinov2": (("classifier/class_head", "classifier"),),
}
_FINE_TUNED = (("head/output", "classifier"),)  # transformers' name for the output layer of a fine-tuned model's head


def _vit(config: ViTConfig, top: str | None) -> Table:
    dinov2 = config.family == "dinov2"
    mlp = _VIT_BLOCK if not dinov2 else _DINOV2_GIANT_BLOCK if config.swiglu else _DINOV2_BLOCK
    norms = _DINOV2_NORMS if dinov2 else _VIT_NORMS
    classifiers = _CLASSIFIERS[config.family]

    def pairs() -> Iterator[tuple[str, str, Transform]]:
        yield from _EMBEDDINGS
        if config.family == "deit":
            yield from _DISTILLATION
        for j in range(config.depth):
            ours, theirs = f"block_{j + 1}/", f"encoder.layer.{j}."
            for path, name in (*_ATTENTION, *mlp):
                yield f"{ours}{path}/kernel", f"{theirs}{name}.weight", DENSE
                if config.qkv_bias or name.rpartition(".")[2] not in ("query", "key", "value"):
                    yield f"{ours}{path}/bias", f"{theirs}{name}.bias", SAME
            for path, name in norms:
                yield f"{ours}{path}/scale", f"{theirs}{name}.weight", SAME
                yield f"{ours}{path}/bias", f"{theirs}{name}.bias", SAME
            if config.layer_scale is not None:
                for path, name in _LAYER_SCALES:
                    yield f"{ours}{path}", f"{theirs}{name}", SAME
        yield "norm/scale", "layernorm.weight", SAME
        yield "norm/bias", "layernorm.bias", SAME
        if top == "classifier":
            for path, name in classifiers:
                yield f"{path}/kernel", f"{name}.weight", DENSE
                yield f"{path}/bias", f"{name}.bias", SAME

    # The mask token serves pretraining only; the pooler is no part of the published classifiers.
    ignored = [r"embeddings\.mask_token", r"pooler\..*"]
    if top != "classifier":
        ignored += [re.escape(name) + r"\..*" for _, name in (*classifiers, *_FINE_TUNED)]
    rows = tuple(Row(path, ((name, transform),)) for path, name, transform in pairs())
    return Table(rows, (f"{config.family}.",), tuple(ignored), unprefixed=("classifier",))


# --- BERT: the names of Hugging Face's repositories; those converted early have gamma and beta in the norms ----------

_BERT_EMBEDDINGS = (
    ("embeddings/word", "embeddings.word_embeddings.weight"),
    ("embeddings/position", "embeddings.position_embeddings.weight"),
    ("embeddings/token_type", "embeddings.token_type_embeddings.weight"),
)
_BERT_LAYER = (
    ("attention/query", "attention.self.query"),
    ("attention/key", "attention.self.key"),
    ("attention/value", "attention.self.value"),
    ("attention/output", "attention.output.dense"),
    ("mlp/fc1", "intermediate.dense"),
    ("mlp/fc2", "output.dense"),
)
_BERT_NORMS = (("norm1", "attention.output.LayerNorm"), ("norm2", "output.LayerNorm"))
_BERT_MLM_BIAS = ("cls.predictions.bias", "cls.predictions.decoder.bias")


def _bert(config: BertConfig, top: str | None) -> Table:
    def norm(path: str, name: str) -> Iterator[Row]:
        yield Row(f"{path}/scale", ((f"{name}.weight", SAME), (f"{name}.gamma", SAME)))
        yield Row(f"{path}/bias", ((f"{name}.bias", SAME), (f"{name}.beta", SAME)))

    def rows() -> Iterator[Row]:
        yield from (Row(path, ((name, SAME),)) for path, name in _BERT_EMBEDDINGS)
        yield from norm("embeddings/norm", "embeddings.LayerNorm")
        for j in range(config.depth):
            ours, theirs = f"layer_{j + 1}/", f"encoder.layer.{j}."
            for path, name in _BERT_LAYER:
                yield from _dense(ours + path, theirs + name)
            for path, name in _BERT_NORMS:
                yield from norm(ours + path, theirs + name)
        if top == "pooler":
            yield from _dense("pooler/dense", "pooler.dense")
        if top == "mlm":
            yield from _dense("mlm/dense", "cls.predictions.transform.dense")
            yield from norm("mlm/norm", "cls.predictions.transform.LayerNorm")
            yield Row("mlm/bias", tuple((name, SAME) for name in _BERT_MLM_BIAS))

    # The decoder is the embedding of words; the next sentence, and heads of fine-tuned models, are not predicted here.
    ignored = [r"embeddings\.position_ids", r"cls\.predictions\.decoder\..*", r"cls\.seq_relationship\..*"]
    ignored += [r"(classifier|qa_outputs)\..*"]
    ignored += [names for stage, names in (("pooler", r"pooler\..*"), ("mlm", r"cls\..*")) if stage != top]
    return Table(tuple(rows()), ("bert.",), tuple(ignored), unprefixed=("mlm",), optional=("pooler", "mlm"))


# --- Heads: the output layer as transformers has it in fine-tuned models; the GRU as torch.nn.GRU ------------------


def head(kind: str) -> Table:
    """Returns the table of a head of ours: `fc`, `mlp` or `bigru`."""
    rows: list[Row] = []
    if kind == "bigru":
        rows += [
            Row(row.path, tuple((f"gru.{name}", transform) for name, transform in row.sources)) for row in gru().rows
        ]
    for path, name in ((("head/hidden", "hidden"),) if kind == "mlp" else ()) + _FINE_TUNED:
        rows += _dense(path, name)
    return Table(tuple(rows), ())


def gru() -> Table:
    """Returns the table of the `bigru` head's recurrent part; its output layer has no row."""
    parameters = (
        ("input_kernel", "weight_ih_l0", DENSE),
        ("input_bias", "bias_ih_l0", SAME),
        ("recurrent_kernel", "weight_hh_l0", DENSE),
        ("recurrent_bias", "bias_hh_l0", SAME),
    )
    directions = (("head/forward", ""), ("head/backward", "_reverse"))
    rows = tuple(
        Row(f"{direction}/{path}", ((name + suffix, transform),))
        for direction, suffix in directions
        for path, name, transform in parameters
    )
    return Table(rows, ())


# --- VGG19: torchvision's names, and timm's ----------------------------------------------------------------


def _vgg(config: VGGConfig, top: str | None) -> Table:
    rows = []
    index, block = 0, "block1"
    for stage, _, _ in config.convolutions():
        if not stage.startswith(block + "_"):  # the pooling layer between blocks has a number too
            block, index = stage.partition("_")[0], index + 1
        rows.append(Row(f"{stage}/kernel", ((f"features.{index}.weight", CONV),)))
        rows.append(Row(f"{stage}/bias", ((f"features.{index}.bias", SAME),)))
        index += 2  # convolution and ReLU
    channels = config.blocks[-1][1]
    classifier = (
        ("fc1", "classifier.0", _flattened(channels), "pre_logits.fc1", _unfolded(channels)),
        ("fc2", "classifier.3", DENSE, "pre_logits.fc2", _unfolded(config.hidden)),
        ("predictions", "classifier.6", DENSE, "head.fc", DENSE),
    )
    if top == "classifier":
        for stage, torchvision, read_torchvision, timm, read_timm in classifier:
            rows.append(
                Row(
                    f"{stage}/kernel",
                    ((f"{torchvision}.weight", read_torchvision), (f"{timm}.weight", read_timm)),
                )
            )
            rows.append(Row(f"{stage}/bias", ((f"{torchvision}.bias", SAME), (f"{timm}.bias", SAME))))
    ignored = () if top == "classifier" else (r"classifier\..*", r"pre_logits\..*", r"head\.fc\..*")
    return Table(tuple(rows), (), ignored)
