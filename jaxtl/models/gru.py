"""The gated recurrent unit (Cho et al. 2014, arXiv:1406.1078) in both directions over a batch of texts."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxtl.models import kernels
from jaxtl.models.stages import Sequence


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

    As cuDNN and torch have it, with the reset gate after the recurrent product: `r, z = sigmoid(W x + b + U h + c)`,
    `n = tanh(W x + b + r * (U h + c))`, `h' = (1 - z) * n + z * h`.

    One scan serves both directions, the second on the time-reversed sequence; the state stays as it is where there is
    no token, which for the reversed one is at the start. The state is float32, operands of products have `dtype`.
    """
    directions = (forward, backward)
    length = x.values.shape[1]

    def both(name: str) -> list[jax.Array]:
        return [getattr(direction, name)[...] for direction in directions]

    # Examples come first as long as they can: on several devices each then has its own.
    inputs = kernels.matmul(x.values, jnp.concatenate(both("input_kernel"), axis=-1), None, dtype)
    inputs = (inputs + jnp.concatenate(both("input_bias"))).swapaxes(0, 1)
    ahead, back = jnp.split(inputs, 2, axis=-1)  # [length, batch, 3 * hidden]
    within = jnp.arange(length)[:, None] < x.lengths
    within = jnp.stack([within, within[::-1]], axis=1)[..., None]
    states = _scan(
        (ahead, back[::-1]),
        within,
        jnp.stack(both("recurrent_kernel")),
        jnp.stack(both("recurrent_bias"))[:, None],
        dtype,
    )
    return states.swapaxes(0, 1).reshape(x.values.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scan(
    inputs: tuple[jax.Array, jax.Array], within: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns the last states, [2, batch, hidden] float32.

    The derivative is written by hand, so that the gradients of kernel and bias are one product and one sum over all
    time steps, in float32, and not added up within the loop, in the dtype that the kernel has there.

    Args:
        inputs: `W x + b` of each direction in its own order, [length, batch, 3 * hidden] float32.
        within: bool [length, 2, batch, 1], whether there is a token.
        kernel, bias: recurrent ones of both, [2, hidden, 3 * hidden] and [2, 1, 3 * hidden].
        dtype: of the products' operands.
    """
    return _scan_forward(inputs, within, kernel, bias, dtype)[0]


def _products(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Both directions' product: [2, batch, n] by [2, n, m] -> [2, batch, m] float32."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(x.astype(dtype), kernel, dimensions, preferred_element_type=jnp.float32)


def _scan_forward(inputs, within, kernel, bias, dtype):
    operand = kernel.astype(dtype)

    def step(h, now):
        inputs, within = now
        input_r, input_z, input_n = jnp.split(jnp.stack(inputs), 3, axis=-1)
        recurrent_r, recurrent_z, recurrent_n = jnp.split(_products(h, operand, dtype) + bias, 3, axis=-1)
        r, z = jax.nn.sigmoid(input_r + recurrent_r), jax.nn.sigmoid(input_z + recurrent_z)
        n = jnp.tanh(input_n + r * recurrent_n)
        return jnp.where(within, (1 - z) * n + z * h, h), (h, r, z, n, recurrent_n)

    start = jnp.zeros((2, inputs[0].shape[1], kernel.shape[1]), jnp.float32)
    states, kept = lax.scan(step, start, (inputs, within))
    return states, (kept, within, kernel)


def _scan_backward(dtype, saved, gradient):
    kept, within, kernel = saved
    transposed = kernel.astype(dtype).swapaxes(1, 2)  # once, and not in the loop

    def step(gradient, now):
        """Goes on to the gradient of the state before; gives those of the inputs and of the recurrent products."""
        (h, r, z, n, recurrent_n), within = now
        new = jnp.where(within, gradient, 0.0)
        of_n = new * (1 - z) * (1 - n * n)
        of_z = new * (h - n) * z * (1 - z)
        of_r = of_n * recurrent_n * r * (1 - r)
        of_recurrent = jnp.concatenate([of_r, of_z, of_n * r], axis=-1)
        of_inputs = jnp.concatenate([of_r, of_z, of_n], axis=-1)
        before = gradient - new + new * z + _products(of_recurrent, transposed, dtype)
        return before, (tuple(of_inputs), tuple(of_recurrent))

    _, (of_inputs, of_recurrent) = lax.scan(step, gradient, (kept, within), reverse=True)
    of_kernel = [
        kernels.outer(states.swapaxes(0, 1), rows.swapaxes(0, 1), dtype)
        for states, rows in zip(kept[0].swapaxes(0, 1), of_recurrent, strict=True)
    ]
    of_bias = [jnp.sum(rows, axis=(0, 1)) for rows in of_recurrent]
    return of_inputs, None, jnp.stack(of_kernel), jnp.stack(of_bias)[:, None]


_scan.defvjp(_scan_forward, _scan_backward)
