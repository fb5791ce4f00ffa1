"""Heads: what reads the backbone and gives logits [batch, nodes] in float32.

What a head reads is taken out of the backbone's output by a stage of its own, `features`, without parameters: so that
of a frozen backbone no more is kept than that.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxtl.models import kernels, layers
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


class Gru(nnx.Module):
    """The parameters of one direction, initial values uniform between +-1 / sqrt(hidden), as torch's GRU.

    The gates r, z, n lie side by side in the last axis.
    """

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        def uniform(*shape: int) -> nnx.Param:
            bound = hidden**-0.5
            return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))

        self.input_kernel = uniform(inputs, 3 * hidden)
        self.input_bias = uniform(3 * hidden)
        self.recurrent_kernel = uniform(hidden, 3 * hidden)
        self.recurrent_bias = uniform(3 * hidden)


def last_states(forward: Gru, backward: Gru, x: Sequence, dtype: jnp.dtype) -> jax.Array:
    """Returns the last states of both directions, [batch, 2 * hidden] float32.

    Cho et al. 2014 (arXiv:1406.1078) as cuDNN and torch have it, with the reset gate after the recurrent product:
    `r, z = sigmoid(W x + b + U h + c)`, `n = tanh(W x + b + r * (U h + c))`, `h' = (1 - z) * n + z * h`.

    One scan serves both directions, the second on the time-reversed sequence; the state stays as it is where there is
    no token, which for the reversed one is at the start. The state is float32, operands of products have `dtype`.
    """
    batch, length, _ = x.values.shape
    directions = (forward, backward)

    def both(name: str) -> jax.Array:
        return jnp.stack([getattr(direction, name)[...] for direction in directions])

    kernel = jnp.concatenate([direction.input_kernel[...] for direction in directions], axis=-1)
    inputs = kernels.matmul(x.values, kernel, None, dtype) + both("input_bias").reshape(-1)
    inputs = inputs.reshape(batch, length, 2, -1).transpose(1, 2, 0, 3)  # [length, 2, batch, 3 * hidden]
    inputs = jnp.stack([inputs[:, 0], inputs[::-1, 1]], axis=1)
    within = (jnp.arange(length)[:, None] < x.lengths)[..., None]  # [length, batch, 1]
    within = jnp.stack([within, within[::-1]], axis=1)
    recurrent_kernel, recurrent_bias = both("recurrent_kernel"), both("recurrent_bias")[:, None]

    def step(h: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        inputs, within = now
        # Cast here and not before the scan, which sums the kernel's gradient over time in the dtype that it gets it in.
        recurrent = lax.dot_general(
            h.astype(dtype),
            recurrent_kernel.astype(dtype),
            (((2,), (1,)), ((0,), (0,))),
            preferred_element_type=jnp.float32,
        )
        input_r, input_z, input_n = jnp.split(inputs, 3, axis=-1)
        recurrent_r, recurrent_z, recurrent_n = jnp.split(recurrent + recurrent_bias, 3, axis=-1)
        r, z = jax.nn.sigmoid(input_r + recurrent_r), jax.nn.sigmoid(input_z + recurrent_z)
        n = jnp.tanh(input_n + r * recurrent_n)
        return jnp.where(within, (1 - z) * n + z * h, h), None

    start = jnp.zeros((2, batch, recurrent_kernel.shape[1]), jnp.float32)
    states, _ = lax.scan(step, start, (inputs, within))
    return states.transpose(1, 0, 2).reshape(batch, -1)


HEADS: dict[str, type[Linear]] = {"fc": Linear, "mlp": Mlp, "bigru": BiGru}
