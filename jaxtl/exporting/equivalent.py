"""What transformers has that is the same function as a model of ours.

Its architectures expect one logit a class, position embeddings of the image size, and a head that reads one certain
thing. Where a model of ours differs, its parameters are written as others that give the same logits.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxtl import config
from jaxtl.models import presets, stages
from jaxtl.models.bert import BertConfig
from jaxtl.models.vgg import VGGConfig
from jaxtl.models.vit import interpolate_positions

# (family, kind of the head, what it reads) -> the class of transformers that has the whole model.
_WHOLE = {
    ("bert", "fc", "pooled"): "BertForSequenceClassification",
    ("bert", "fc", "cls"): "BertForSequenceClassification",
    ("bert", "mlm", "masked"): "BertForMaskedLM",
    ("vit", "fc", "cls"): "ViTForImageClassification",
    ("deit", "fc", "cls"): "DeiTForImageClassification",
    ("dinov2", "fc", "cls"): "Dinov2ForImageClassification",
    ("dinov2", "fc", "cls_patches"): "Dinov2ForImageClassification",
}
# (family, what is kept of its pretrained top) -> the class that has the backbone of any other. VGG19 has none.
_BACKBONE = {
    ("bert", None): "BertModel",
    ("bert", "pooler"): "BertModel",
    ("vit", None): "ViTModel",
    ("vit", "classifier"): "ViTForImageClassification",
    ("deit", None): "DeiTModel",
    ("deit", "classifier"): "DeiTForImageClassificationWithTeacher",
    ("dinov2", None): "Dinov2Model",
}
# A pooler that passes the class token on differs from it by less than this part of each value.
_POOLER_ERROR = 1e-6


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """A model as others have it.

    Attributes:
        architecture: the class of transformers; '' of VGG19, which is torchvision's.
        whole: whether it has the head too.
        config: of the backbone.
        top: what of the pretrained top is in it, see `presets.backbone`.
        params: of backbone and head, by our paths.
        notes: what a user of it should know, in sentences.
    """

    architecture: str
    whole: bool
    config: presets.Config
    top: str | None
    params: dict[str, np.ndarray]
    notes: tuple[str, ...]


def equivalent(architecture: presets.Config, model: config.Model, classes: int, params: stages.Params) -> Equivalent:
    """Returns what is the same as a model of ours, up to rounding.

    Args:
        architecture: the backbone.
        model: head and image size.
        classes: number of classes; 0 of masked language modelling.
        params: all parameters by path.
    """
    params = {path: np.asarray(value) for path, value in params.items()}
    kind, reads = model.head.kind, model.head.reads
    top = presets.top(reads)
    name = _WHOLE.get((architecture.family, kind, reads))
    notes = []
    if classes == 2:
        params |= _two_logits(params)
        notes.append("Trained with one output for two classes: the first logit is always 0, softmax is its sigmoid.")
    if name and architecture.family == "dinov2" and reads == "cls":
        kernel = params["head/output/kernel"]
        params["head/output/kernel"] = np.concatenate([kernel, np.zeros_like(kernel)])
        notes.append(
            "Trained on the class token alone: the classifier's weights on the mean of the patches, which this "
            "architecture reads too, are 0."
        )
    if name and isinstance(architecture, BertConfig) and reads == "cls":
        params |= _transparent_pooler(params, architecture)
        top = "pooler"
        notes.append(
            "Trained on the [CLS] vector itself, while this architecture puts a dense layer and tanh before the "
            f"classifier. Those are made transparent: {params['pooler/dense/kernel'][0, 0]:g} times the identity, "
            "where tanh is straight, and the classifier's weights larger by as much. The pooler is no pretrained one: "
            "to train this model further, start from `AutoModel`, or from the run."
        )
    if architecture.family in ("vit", "deit") and model.image_size != architecture.image_size:
        params |= _resized_positions(params, architecture, model.image_size)
        notes.append(
            f"Position embeddings are resized from {architecture.image_size} to {model.image_size} pixels, as in "
            "training."
        )
        architecture = dataclasses.replace(architecture, image_size=model.image_size)
    backbone = "" if isinstance(architecture, VGGConfig) else _BACKBONE.get((architecture.family, top), "")
    return Equivalent(name or backbone, bool(name), architecture, top, params, tuple(notes))


def _two_logits(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the output layer with a node before its own that is always 0: softmax of the two is the sigmoid."""
    kernel, bias = params["head/output/kernel"], params["head/output/bias"]
    return {
        "head/output/kernel": np.concatenate([np.zeros_like(kernel), kernel], axis=1),
        "head/output/bias": np.concatenate([np.zeros_like(bias), bias]),
    }


def _transparent_pooler(params: dict[str, np.ndarray], architecture: BertConfig) -> dict[str, np.ndarray]:
    """Returns a pooler and an output layer that together are the output layer alone.

    tanh(u) = u (1 - u^2 / 3 + ..), and what the last layer norm puts out is bounded by its parameters: a power of two,
    which rounds nothing, makes every u small enough.
    """
    norm = f"layer_{architecture.depth}/norm2/"
    bound = np.max(math.sqrt(architecture.width) * np.abs(params[norm + "scale"]) + np.abs(params[norm + "bias"]))
    factor = 2.0 ** math.floor(math.log2(math.sqrt(3 * _POOLER_ERROR) / bound))
    return {
        "pooler/dense/kernel": np.eye(architecture.width, dtype=np.float32) * np.float32(factor),
        "pooler/dense/bias": np.zeros(architecture.width, np.float32),
        "head/output/kernel": params["head/output/kernel"] / np.float32(factor),
    }


def _resized_positions(params: dict[str, np.ndarray], architecture: presets.Config, size: int) -> dict[str, np.ndarray]:
    side = size // architecture.patch_size
    path = "embeddings/position"
    resized = interpolate_positions(jnp.asarray(params[path]), architecture.special_tokens, (side, side))
    return {path: np.asarray(resized)}
