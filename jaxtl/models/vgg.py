"""VGG19 (Simonyan and Zisserman, 2014, arXiv:1409.1556), without batch normalisation.

Stages have the paper's blocks in Keras's names: `block1_conv1, block1_conv2, block1_pool, .. block5_pool` and, where
the pretrained classifier is kept, `fc1, fc2, predictions`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl.models import kernels, layers
from jaxtl.models.stages import Staged


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """Architecture and size.

    Attributes:
        blocks: (convolutions, channels) of each block.
        classes: outputs of the pretrained classifier.
        hidden: width of the classifier's two hidden layers.
        image_size: side in pixels that the classifier was made for; the convolutions take any.
    """

    blocks: tuple[tuple[int, int], ...] = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))
    classes: int = 1000
    hidden: int = 4096
    image_size: int = 224
    family: str = "vgg"

    def convolutions(self) -> list[tuple[str, int, int]]:
        """Returns (stage name, input channels, output channels) of every convolution, in order."""
        found, inputs = [], 3
        for block, (count, channels) in enumerate(self.blocks, 1):
            for index in range(1, count + 1):
                found.append((f"block{block}_conv{index}", inputs, channels))
                inputs = channels
        return found


def vgg(config: VGGConfig, *, top: str | None, dtype: jnp.dtype, rngs: nnx.Rngs) -> Staged:
    """Builds the backbone: images [batch, size, size, 3] -> [batch, size / 32, size / 32, 512], or logits."""
    stages: list[tuple[str, nnx.Module]] = []
    convolutions = config.convolutions()
    for index, (name, inputs, outputs) in enumerate(convolutions):
        stages.append((name, Conv(inputs, outputs, dtype=dtype, rngs=rngs)))
        block = name.partition("_")[0]
        if index + 1 == len(convolutions) or not convolutions[index + 1][0].startswith(block + "_"):
            stages.append((f"{block}_pool", MaxPool()))
    if top == "classifier":
        side = config.image_size // 2 ** len(config.blocks)
        flat = side * side * config.blocks[-1][1]
        stages += [
            ("fc1", FullyConnected(flat, config.hidden, hidden=True, dtype=dtype, rngs=rngs)),
            ("fc2", FullyConnected(config.hidden, config.hidden, hidden=True, dtype=dtype, rngs=rngs)),
            ("predictions", FullyConnected(config.hidden, config.classes, hidden=False, dtype=dtype, rngs=rngs)),
        ]
    return Staged(stages)


class Conv(nnx.Module):
    """3x3 convolution and ReLU: [batch, height, width, inputs] -> [batch, height, width, outputs]."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        y = kernels.convolution(x, self.kernel[...], self.dtype)
        return jax.nn.relu(y + self.bias[...].astype(self.dtype))


class MaxPool(nnx.Module):
    """2x2 maximum, stride 2: height and width halve."""

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        return nnx.max_pool(x, (2, 2), strides=(2, 2))


class FullyConnected(layers.Dense):
    """A layer of the classifier: flattens, dense; hidden ones with ReLU and dropout 0.5."""

    def __init__(self, inputs: int, outputs: int, *, hidden: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, init=nnx.initializers.normal(0.01), dtype=dtype, rngs=rngs)
        self.hidden = hidden

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        y = super().__call__(x.reshape(x.shape[0], -1))
        return kernels.dropout(jax.nn.relu(y), 0.5, rng) if self.hidden else y.astype(jnp.float32)
