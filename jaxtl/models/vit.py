"""Vision transformers: ViT, DeiT distilled and DINOv2, one implementation.

Dosovitskiy et al. 2020 (arXiv:2010.11929), Touvron et al. 2020 (arXiv:2012.12877), Oquab et al. 2023
(arXiv:2304.07193). Pre-norm blocks on a class token, DeiT's distillation token, and one token a patch. Stages:
`embeddings, block_1 .. block_N, norm` and, where the pretrained classifier is kept, `classifier`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtl.models import kernels, layers
from jaxtl.models.stages import Staged


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture and size.

    Attributes:
        image_size: side in pixels of the images the position embeddings were made for. Other sizes interpolate.
        classes: outputs of the pretrained classifier; None when the checkpoint has none.
        layer_scale: initial value of DINOv2's LayerScale; None for models without it.
        hidden_dropout, attention_dropout: rates; zero in all published checkpoints.
    """

    family: Literal["vit", "deit", "dinov2"]
    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    classes: int | None = None
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    qkv_bias: bool = True
    layer_scale: float | None = None
    swiglu: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def special_tokens(self) -> int:
        """Tokens before the patches: class, and for DeiT distillation."""
        return 2 if self.family == "deit" else 1

    @property
    def grid(self) -> int:
        """Patches along one side of the pretraining image."""
        return self.image_size // self.patch_size


def vit(config: ViTConfig, *, top: str | None, leading: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs) -> Staged:
    """Builds the backbone: images [batch, size, size, 3] -> tokens [batch, tokens, width], or logits.

    With `leading`, the last block returns only that many of the leading tokens, for what comes after reads no others.

    The image size is free where it is a multiple of the patch size, as in transformers.
    """
    blocks = [
        (f"block_{i + 1}", Block(config, leading if i + 1 == config.depth else None, dtype=dtype, rngs=rngs))
        for i in range(config.depth)
    ]
    stages = [
        ("embeddings", Embeddings(config, dtype=dtype, rngs=rngs)),
        *blocks,
        ("norm", FinalNorm(config, dtype=dtype)),
    ]
    if top == "classifier":
        stages.append(("classifier", Classifier(config, dtype=dtype, rngs=rngs)))
    return Staged(stages)


class Embeddings(nnx.Module):
    """Patches, special tokens and positions: [batch, height, width, channels] -> [batch, tokens, width]."""

    def __init__(self, config: ViTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = layers.trunc_normal
        self.patch = layers.Dense(config.patch_size**2 * 3, config.width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        if config.family == "deit":
            self.distillation_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        tokens = config.grid**2 + config.special_tokens
        self.position = nnx.Param(init(rngs.params(), (1, tokens, config.width)))
        self.config = config
        self.dtype = dtype

    def __call__(self, images: jax.Array, rng: jax.Array | None) -> jax.Array:
        config, size = self.config, self.config.patch_size
        batch, height, width, channels = images.shape
        rows, columns = height // size, width // size
        # A stride-p convolution with a p x p kernel is a matrix product over cut-out patches.
        patches = images[:, : rows * size, : columns * size]
        patches = patches.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(patches.reshape(batch, rows * columns, -1))
        special = [self.class_token[...]]
        if config.family == "deit":
            special.append(self.distillation_token[...])
        special = [jnp.broadcast_to(token, (batch, 1, config.width)).astype(self.dtype) for token in special]
        x = jnp.concatenate([*special, x], axis=1)
        position = interpolate_positions(self.position[...], config.special_tokens, (rows, columns))
        return kernels.dropout((x + position).astype(self.dtype), config.hidden_dropout, rng)


class Block(nnx.Module):
    """Pre-norm transformer block: [batch, tokens, width] -> the same, or the `leading` tokens of it."""

    def __init__(self, config: ViTConfig, leading: int | None = None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def norm():
            return layers.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype)

        self.norm1, self.norm2 = norm(), norm()
        self.attention = layers.Attention(
            config.width,
            config.heads,
            qkv_bias=config.qkv_bias,
            dropout=config.attention_dropout,
            dtype=dtype,
            rngs=rngs,
        )
        if config.swiglu:
            self.mlp = layers.SwiGlu(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        else:
            self.mlp = layers.Mlp(config.width, config.mlp_width, activation=config.activation, dtype=dtype, rngs=rngs)
        if config.layer_scale is not None:
            self.layer_scale1 = nnx.Param(jnp.full(config.width, config.layer_scale, jnp.float32))
            self.layer_scale2 = nnx.Param(jnp.full(config.width, config.layer_scale, jnp.float32))
        self.config = config
        self.leading = leading
        self.dtype = dtype

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        attention_rng, rng1, rng2 = layers.split(rng, 3)
        scaled = self.config.layer_scale is not None
        rate = self.config.hidden_dropout

        y = self.attention(x, attention_rng, leading=self.leading, norm=self.norm1)
        y = y * self.layer_scale1[...] if scaled else y
        x = (x[:, : self.leading] + kernels.dropout(y, rate, rng1)).astype(self.dtype)
        y = self.mlp(self.norm2(x))
        y = y * self.layer_scale2[...] if scaled else y
        return (x + kernels.dropout(y, rate, rng2)).astype(self.dtype)


class FinalNorm(layers.LayerNorm):
    """The layer norm after the last block."""

    def __init__(self, config: ViTConfig, *, dtype: jnp.dtype):
        super().__init__(config.width, epsilon=config.norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        return super().__call__(x)


class Classifier(nnx.Module):
    """The pretrained classifier: tokens -> logits [batch, classes] float32; DeiT: the mean of its two heads."""

    def __init__(self, config: ViTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.class_head = layers.Dense(config.width, config.classes, dtype=dtype, rngs=rngs)
        if config.family == "deit":
            self.distillation_head = layers.Dense(config.width, config.classes, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        logits = self.class_head(x[:, 0]).astype(jnp.float32)
        if self.config.family == "deit":
            logits = (logits + self.distillation_head(x[:, 1]).astype(jnp.float32)) / 2
        return logits


def interpolate_positions(position: jax.Array, special: int, grid: tuple[int, int]) -> jax.Array:
    """Resizes the patches' position embeddings to a grid of (rows, columns), as transformers does.

    Bicubic with half-pixel centres, no antialiasing. Identity where the grid is the stored one.

    Args:
        position: [1, special + side * side, width] float32.
        special: leading embeddings that belong to no patch.
        grid: rows and columns of patches.
    """
    side = int((position.shape[1] - special) ** 0.5)
    if grid == (side, side):
        return position
    rows, columns = (jnp.asarray(bicubic_weights(side, length)) for length in grid)
    patches = position[0, special:].reshape(side, side, -1)
    # Full float32: a TPU would otherwise round the embeddings to bfloat16.
    resized = jnp.einsum("ri,cj,ijd->rcd", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([position[:, :special], resized.reshape(1, -1, position.shape[2])], axis=1)


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """Returns the [target, source] float32 matrix of torch's bicubic interpolation (a = -0.75, border repeated).

    `jax.image.resize` cannot stand in: its cubic kernel has a = -0.5 and renormalises at the border.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        distance = np.abs(centre - (left + offset))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        np.add.at(
            weights,
            (np.arange(target), np.clip(left + offset, 0, source - 1)),
            np.where(distance <= 1, near, far),
        )
    return weights.astype(np.float32)
