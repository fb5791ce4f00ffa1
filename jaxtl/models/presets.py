"""Published architectures by name, and the model an experiment asks for."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl.models.bert import BertConfig, bert
from jaxtl.models.heads import HEADS, READERS, Features, nodes
from jaxtl.models.stages import Sequence, Staged, values
from jaxtl.models.vgg import VGGConfig, vgg
from jaxtl.models.vit import ViTConfig, vit

Config = ViTConfig | VGGConfig | BertConfig

# name: width, depth, heads
_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def _deit(size: str) -> ViTConfig:
    width, depth, heads = _SIZES[size]
    return ViTConfig("deit", width, depth, heads, 4 * width, patch_size=16, image_size=224, classes=1000)


def _vit(size: str, classes: int | None = 1000) -> ViTConfig:
    width, depth, heads = _SIZES[size]
    return ViTConfig("vit", width, depth, heads, 4 * width, patch_size=16, image_size=224, classes=classes)


def _dinov2(size: str) -> ViTConfig:
    width, depth, heads = _SIZES[size] if size != "giant" else (1536, 40, 24)
    # SwiGLU: two thirds of 4 * width, rounded up to a multiple of 8.
    mlp_width = (int(4 * width * 2 / 3) + 7) // 8 * 8 if size == "giant" else 4 * width
    return ViTConfig(
        "dinov2",
        width,
        depth,
        heads,
        mlp_width,
        patch_size=14,
        image_size=518,
        norm_epsilon=1e-6,
        layer_scale=1.0,
        swiglu=size == "giant",
    )


def _bert(size: str, vocabulary: int) -> BertConfig:
    width, depth, heads = _SIZES[size]
    return BertConfig("bert", vocabulary, width, depth, heads, 4 * width)


PRESETS: dict[str, Config] = {
    "deit_tiny_distilled_patch16_224": _deit("tiny"),
    "deit_small_distilled_patch16_224": _deit("small"),
    "deit_base_distilled_patch16_224": _deit("base"),
    "vit_base_patch16_224": _vit("base"),
    "vit_base_patch16_224_in21k": _vit("base", classes=None),
    "vit_large_patch16_224": _vit("large"),
    "dinov2_small": _dinov2("small"),
    "dinov2_base": _dinov2("base"),
    "dinov2_large": _dinov2("large"),
    "dinov2_giant": _dinov2("giant"),
    "vgg19": VGGConfig(),
    "bert_base_uncased": _bert("base", 30522),
    "bert_base_cased": _bert("base", 28996),
    "bert_large_uncased": _bert("large", 30522),
    "covid_twitter_bert_v2": _bert("large", 30522),  # pretraining of bert-large-uncased, continued
    "minilm_l6": BertConfig("bert", 30522, 384, 6, 12, 1536),
    # Small enough to pretrain in seconds on two cores; of our making, no published weights.
    "vit_nano_patch2_8": ViTConfig("vit", 64, 4, 4, 256, patch_size=2, image_size=8),
    "bert_nano": BertConfig("bert", 30522, 64, 2, 4, 128, positions=128),
}


# What a backbone may end in beside its last layer, kept from pretraining, and what makes it.
_BACKBONES: dict[type, tuple[Callable[..., Staged], tuple[str, ...]]] = {
    ViTConfig: (vit, ("classifier",)),
    VGGConfig: (vgg, ("classifier",)),
    BertConfig: (bert, ("pooler", "mlm")),
}


def top(reads: str) -> str | None:
    """Returns what of the pretrained top a head that reads this needs: `classifier`, `pooler`, `mlm` or None."""
    return {"logits": "classifier", "pooled": "pooler", "masked": "mlm"}.get(reads)


def leading(config: Config, reads: str) -> int | None:
    """Returns how many of a transformer's leading tokens a head that reads this depends on; None: on all."""
    if isinstance(config, VGGConfig):
        return None
    if reads == "logits":  # DeiT's classifier reads the distillation token too
        return config.special_tokens
    return 1 if reads in ("cls", "pooled") else None


def backbone(
    config: Config, *, top: str | None, leading: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Staged:
    """Builds the backbone of a config.

    Args:
        config: architecture and size.
        top: what to keep of the pretrained top, as its last stages: None; `classifier` (images); `pooler` or `mlm`
            (BERT).
        leading: the last block computes only so many of the leading tokens; None, and in a convolutional network: all.
        dtype: compute dtype.
        rngs: random streams for the initial values.

    Raises:
        ValueError: this backbone has no such top.
    """
    make, tops = _BACKBONES[type(config)]
    if top not in (None, *tops):
        raise ValueError(f"a {config.family} backbone has a {' or a '.join(tops)} on top, no {top}")
    pruned = {} if leading is None else {"leading": leading}
    return make(config, top=top, **pruned, dtype=dtype, rngs=rngs)


def model(
    config: Config,
    *,
    kind: str,
    reads: str,
    hidden: int,
    dropout: float,
    init: str,
    classes: int,
    inputs: jax.ShapeDtypeStruct | Sequence,
    precision: str,
    prune: bool = True,
) -> Callable[[nnx.Rngs], Staged]:
    """Returns the function that builds the model: the backbone, `features` where the head reads a part, `head`.

    It gives logits float32 [batch, nodes]: one node for two classes, else one for each. Kind `mlm` has no head:
    `features` lies before the pretrained `mlm`, which gives logits float32 [batch, read, vocabulary].

    Args:
        config: the backbone.
        kind, reads, hidden, dropout, init: the head, see `jaxtl.models.heads`.
        classes: number of classes to tell apart; without meaning for `mlm`.
        inputs: one row of the model's input, abstract: images float32 [1, size, size, 3]; or a Sequence of ids int32
            [1, length], lengths int32 [1] and, for `mlm`, positions int32 [1, read].
        precision: compute dtype, by name.
        prune: of the last block, compute only the tokens that the head reads.

    Raises:
        ValueError: input, backbone and head do not fit together.
    """
    _check(config, kind, reads, inputs)
    dtype = jnp.dtype(precision)
    read = leading(config, reads) if prune else None

    def body(rngs: nnx.Rngs) -> list[tuple[str, nnx.Module]]:
        made = backbone(config, top=top(reads), leading=read, dtype=dtype, rngs=rngs)
        named = [(name, getattr(made, name)) for name in made.stages]
        if reads in READERS:
            named.insert(len(named) - (kind == "mlm"), ("features", Features(reads)))
        return named

    if kind == "mlm":
        return lambda rngs: Staged(body(rngs))
    features = jax.eval_shape(lambda x: values(Staged(body(nnx.Rngs(0)))(x)), inputs)

    def build(rngs: nnx.Rngs) -> Staged:
        named = body(rngs)
        head = HEADS[kind](
            features.shape[-1],
            hidden=hidden,
            nodes=nodes(classes),
            dropout=dropout,
            init=init,
            dtype=dtype,
            rngs=rngs,
        )
        return Staged([*named, ("head", head)])

    return build


def _readable(config: Config) -> dict[str, tuple[str, ...]]:
    """Returns the kinds of head that fit on a backbone, and what each may read."""
    if isinstance(config, BertConfig):
        array = ("cls", "pooled")
        return {"fc": array, "mlp": array, "bigru": ("sequence",), "mlm": ("masked",)}
    if isinstance(config, VGGConfig):
        array = ("flatten", "logits")
    else:
        # DeiT's distillation token is neither the class token nor a patch.
        array = ("cls",) if config.family == "deit" else ("cls", "cls_patches")
        array += ("logits",) if config.classes else ()
    return {"fc": array, "mlp": array}


def _check(config: Config, kind: str, reads: str, inputs: jax.ShapeDtypeStruct | Sequence) -> None:
    allowed, is_text = _readable(config), isinstance(config, BertConfig)
    if kind not in allowed:
        raise ValueError(f"the head of a {config.family} backbone is {' or '.join(allowed)}, not {kind}")
    if reads not in allowed[kind]:
        raise ValueError(
            f"a head of kind {kind} on a {config.family} backbone reads {' or '.join(allowed[kind])}, not {reads}"
        )
    if is_text != isinstance(inputs, Sequence):
        takes, given = ("texts", "images") if is_text else ("images", "texts")
        raise ValueError(f"a {config.family} backbone takes {takes}, not {given}")
    (_check_text if is_text else _check_images)(config, reads, inputs)


def _check_text(config: BertConfig, reads: str, inputs: Sequence) -> None:
    length = inputs.values.shape[1]
    if length > config.positions:
        raise ValueError(f"texts of {length} tokens are longer than this backbone's {config.positions} positions")
    if (reads == "masked") != (inputs.positions is not None):
        raise ValueError("positions to read are given for masked language modelling, and for nothing else")


def _check_images(config: ViTConfig | VGGConfig, reads: str, inputs: jax.ShapeDtypeStruct) -> None:
    image_size = inputs.shape[1]
    if isinstance(config, ViTConfig):
        if image_size % config.patch_size:
            lower = max(image_size // config.patch_size, 1) * config.patch_size
            raise ValueError(
                f"the image size must be a multiple of the patch size {config.patch_size}: "
                f"{lower} or {lower + config.patch_size}"
            )
        return
    if reads == "logits" and image_size != config.image_size:
        raise ValueError(f"VGG19's own classifier takes images of {config.image_size} pixels only")
    if image_size < 2 ** len(config.blocks):
        raise ValueError(f"VGG19 needs images of at least {2 ** len(config.blocks)} pixels")


def same_architecture(a: Config, b: Config) -> list[str]:
    """Returns what differs between two configs in the fields that parameters' shapes or meaning depend on."""
    if type(a) is not type(b) or a.family != b.family:
        return [f"family {a.family} against {b.family}"]
    free = {"classes", "norm_epsilon", "hidden_dropout", "attention_dropout", "layer_scale"}
    names = [field.name for field in dataclasses.fields(a) if field.name not in free]
    return [
        f"{name} {getattr(a, name)} against {getattr(b, name)}"
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]
