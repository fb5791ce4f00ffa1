"""Published architectures by name, and the model an experiment asks for."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl.models.heads import READERS, Head
from jaxtl.models.stages import Staged
from jaxtl.models.vgg import VGGConfig, vgg
from jaxtl.models.vit import ViTConfig, vit

Config = ViTConfig | VGGConfig

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
    # Small enough to pretrain in seconds on two cores; of our making, no published weights.
    "vit_nano_patch2_8": ViTConfig("vit", 64, 4, 4, 256, patch_size=2, image_size=8),
}


def backbone(config: Config, *, with_classifier: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> Staged:
    """Builds the backbone of a config; `with_classifier` keeps the pretrained classifier as its last stages."""
    make = vgg if isinstance(config, VGGConfig) else vit
    return make(config, with_classifier=with_classifier, dtype=dtype, rngs=rngs)


def classifier(
    config: Config,
    *,
    kind: str,
    reads: str,
    hidden: int,
    dropout: float,
    classes: int,
    image_size: int,
    precision: str,
    init: str = "zero",
) -> Callable[[nnx.Rngs], Staged]:
    """Returns the function that builds backbone and head: images [batch, size, size, 3] -> logits [batch, classes].

    Args:
        config: the backbone.
        kind, reads, hidden, dropout, init: the head, see `jaxtl.models.heads`.
        classes: number of classes to tell apart.
        image_size: side of the images, in pixels.
        precision: compute dtype, by name.

    Raises:
        ValueError: image size, backbone and head do not fit together.
    """
    _check(config, reads, image_size)
    dtype = jnp.dtype(precision)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with_classifier = reads == "logits"

    def output_shape() -> jax.ShapeDtypeStruct:
        def run(images):
            return backbone(config, with_classifier=with_classifier, dtype=dtype, rngs=nnx.Rngs(0))(images)

        return jax.eval_shape(lambda images: READERS[reads](run(images)), images)

    inputs = output_shape().shape[-1]

    def build(rngs: nnx.Rngs) -> Staged:
        body = backbone(config, with_classifier=with_classifier, dtype=dtype, rngs=rngs)
        head = Head(
            kind,
            reads,
            inputs=inputs,
            hidden=hidden,
            classes=classes,
            dropout=dropout,
            init=init,
            dtype=dtype,
            rngs=rngs,
        )
        return Staged([*((name, getattr(body, name)) for name in body.stages), ("head", head)])

    return build


def _check(config: Config, reads: str, image_size: int) -> None:
    if isinstance(config, VGGConfig):
        allowed = ("flatten", "logits")
        if reads == "logits" and image_size != config.image_size:
            raise ValueError(f"VGG19's own classifier takes images of {config.image_size} pixels only")
        if image_size < 2 ** len(config.blocks):
            raise ValueError(f"VGG19 needs images of at least {2 ** len(config.blocks)} pixels")
    else:
        # DeiT's distillation token is neither the class token nor a patch.
        allowed = ("cls",) if config.family == "deit" else ("cls", "cls_patches")
        allowed += ("logits",) if config.classes else ()
        if image_size % config.patch_size:
            lower = max(image_size // config.patch_size, 1) * config.patch_size
            raise ValueError(
                f"the image size must be a multiple of the patch size {config.patch_size}: "
                f"{lower} or {lower + config.patch_size}"
            )
    if reads not in allowed:
        raise ValueError(f"a head on this backbone reads {' or '.join(allowed)}, not {reads}")


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
