"""Heads: what reads the backbone and gives logits [batch, nodes] in float32.

What a head reads is taken out of the backbone's output by a stage of its own, `features`, without parameters: so that
of a frozen backbone no more is kept than that.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl.models import kernels, layers
from jaxtl.models.gru import Gru, last_states
from jaxtl.models.stages import Sequence, values


def _masked(x: Sequence) -> jax.Array:
    return jnp.take_along_axis(x.values, x.positions[..., None], axis=1, mode="clip")


# What a head may read, from the output of the backbone's last stage; those not named here hand it on as it is
# (`logits`, `pooled`, `sequence`).
READERS: dict[str, Callable] = {
    "cls": lambda x: values(x)[:, 0],
    "cls_patches": lambda x: jnp.concatenate([x[:, 0], x[:, 1:].mean(axis=1)], axis=-1),
    "flatten": lambda x: x.reshape(x.shape[0], -1),
    "masked": _masked,  # -> [batch, read, width]
}

_OUTPUT_INIT = {"zero": nnx.initializers.zeros_init(), "random": nnx.initializers.glorot_uniform()}


def nodes(classes: int) -> int:
    """Returns the number of outputs: one for two classes, whose sigmoid is the second's probability."""
    return 1 if classes == 2 else classes


class Features(nnx.Module):
    """The stage between backbone and head: what the head reads, see `READERS`."""

    def __init__(self, reads: str):
        self.reads = reads

    def __call__(self, x: Sequence | jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        return READERS[self.reads](x)


class Linear(nnx.Module):
    """`fc`: dropout, dense: [batch, inputs] -> logits [batch, nodes] float32.

    The output layer starts from zero, as in ViT's fine-tuning (Dosovitskiy et al. 2020, 3.2): a pretrained backbone's
    features are large, and a random layer on them would begin by being confidently wrong. With `init="random"` it
    starts from Glorot's uniform distribution, for a backbone that is trained from scratch.
    """

    def __init__(
        self, inputs: int, *, hidden: int, nodes: int, dropout: float, init: str, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        del hidden
        self.output = layers.Dense(inputs, nodes, init=_OUTPUT_INIT[init], dtype=dtype, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        x = kernels.dropout(x, self.dropout, rng)
        # Without the output layer's own rounding to the compute dtype: logits are float32.
        return kernels.matmul(x, self.output.kernel[...], None, self.output.dtype) + self.output.bias[...]


class Mlp(Linear):
    """`mlp`: dense, ReLU, dropout, dense.

    The hidden layer starts from the uniform distribution between +-1 / sqrt(inputs) (LeCun et al. 1998), as torch's
    Linear does.
    """

    def __init__(self, inputs: int, *, hidden: int, dtype: jnp.dtype, rngs: nnx.Rngs, **output):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.hidden = layers.Dense(inputs, hidden, init=uniform, dtype=dtype, rngs=rngs)
        super().__init__(hidden, hidden=hidden, dtype=dtype, rngs=rngs, **output)

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return super().__call__(jax.nn.relu(self.hidden(x)), rng)


class BiGru(Linear):
    """`bigru`: a GRU in each direction, their last states side by side, dropout, dense.

    Takes a Sequence. The forward direction's last state is that after the last token within the length, the backward
    direction's that after the first.
    """

    def __init__(self, inputs: int, *, hidden: int, dtype: jnp.dtype, rngs: nnx.Rngs, **output):
        self.forward = Gru(inputs, hidden, rngs=rngs)
        self.backward = Gru(inputs, hidden, rngs=rngs)
        self.dtype = dtype
        super().__init__(2 * hidden, hidden=hidden, dtype=dtype, rngs=rngs, **output)

    def __call__(self, x: Sequence, rng: jax.Array | None) -> jax.Array:
        return super().__call__(last_states(self.forward, self.backward, x, self.dtype), rng)


HEADS: dict[str, type[Linear]] = {"fc": Linear, "mlp": Mlp, "bigru": BiGru}
