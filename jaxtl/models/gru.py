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

    def both(name: str) -> list[jax.Array]:
        return [getattr(direction, name)[...] for direction in directions]

    inputs = kernels.matmul(x.values, jnp.concatenate(both("input_kernel"), axis=-1), None, dtype)
    states = _scan(
        inputs + jnp.concatenate(both("input_bias")),
        x.lengths,
        jnp.stack(both("recurrent_kernel")),
        jnp.stack(both("recurrent_bias"))[:, None],
        dtype,
    )
    return states.swapaxes(0, 1).reshape(x.values.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scan(inputs: jax.Array, lengths: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the last states, [2, batch, hidden] float32.

    The derivative is written by hand. All that the gradient of a state is multiplied by is known when the loop goes
    back, and is made for all time steps at once, from the states alone, which are all that is kept. So are the
    gradients of kernel and bias, one product and one sum, in float32: not added up within the loop, in the dtype that
    the kernel has there.

    Args:
        inputs: `W x + b` of both directions side by side, [batch, length, 6 * hidden] float32. Examples come first
            wherever they can: on several devices each then has its own.
        lengths: int32 [batch].
        kernel, bias: recurrent ones of both, [2, hidden, 3 * hidden] and [2, 1, 3 * hidden].
        dtype: of the products' operands.
    """
    return _scan_forward(inputs, lengths, kernel, bias, dtype)[0]


def _products(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Both directions' product: [2, batch, n] by [2, n, m] -> [2, batch, m] float32."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(x.astype(dtype), kernel, dimensions, preferred_element_type=jnp.float32)


def _gates(inputs: jax.Array, recurrent: jax.Array) -> tuple[jax.Array, ...]:
    """Returns r, z and n, and the recurrent part of n, from both parts of all three: [..., 3 * hidden]."""
    input_r, input_z, input_n = jnp.split(inputs, 3, axis=-1)
    recurrent_r, recurrent_z, recurrent_n = jnp.split(recurrent, 3, axis=-1)
    r, z = jax.nn.sigmoid(input_r + recurrent_r), jax.nn.sigmoid(input_z + recurrent_z)
    return r, z, jnp.tanh(input_n + r * recurrent_n), recurrent_n


def _in_turn(ahead: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what both directions meet, as they meet it: [batch, length, n] -> [length, batch, n], `back` reversed."""
    return ahead.swapaxes(0, 1), back[:, ::-1].swapaxes(0, 1)


def _in_place(met: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what both directions have met where it belongs: [length, 2, batch, n] -> [batch, length, n] of each."""
    return met[:, 0].swapaxes(0, 1), met[::-1, 1].swapaxes(0, 1)


def _tokens(inputs: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns where there is a token, bool [batch, length, 1]."""
    return (jnp.arange(inputs.shape[1]) < lengths[:, None])[..., None]


def _scan_forward(inputs, lengths, kernel, bias, dtype):
    operand = kernel.astype(dtype)

    def step(h, now):
        inputs, tokens = (jnp.stack(pair) for pair in now)
        _, z, n, _ = _gates(inputs, _products(h, operand, dtype) + bias)
        return jnp.where(tokens, (1 - z) * n + z * h, h), h

    start = jnp.zeros((2, inputs.shape[0], kernel.shape[1]), jnp.float32)
    tokens = _tokens(inputs, lengths)
    met = _in_turn(*jnp.split(inputs, 2, axis=-1)), _in_turn(tokens, tokens)
    states, before = lax.scan(step, start, met)
    return states, (before, inputs, lengths, kernel, bias)


def _scan_backward(dtype, saved, gradient):
    before, inputs, lengths, kernel, bias = saved
    tokens = _tokens(inputs, lengths)
    # Of each direction: the states before each step, and the derivatives by the state after it of what is summed in n,
    # of what is summed in r and z and of the recurrent part of n, and of the state before by n's and z's mixing alone.
    states, of_n, of_sums, of_before = _in_place(before), [], [], []
    for direction, (h, given) in enumerate(zip(states, jnp.split(inputs, 2, axis=-1), strict=True)):
        recurrent = kernels.matmul(h, kernel[direction], None, dtype) + bias[direction]
        r, z, n, recurrent_n = _gates(given, recurrent)
        by_n = jnp.where(tokens, (1 - z) * (1 - n * n), 0.0)
        by_z = jnp.where(tokens, (h - n) * z * (1 - z), 0.0)
        of_n.append(by_n)
        of_sums.append(jnp.concatenate([by_n * recurrent_n * r * (1 - r), by_z, by_n * r], axis=-1))
        of_before.append(jnp.where(tokens, z, 1.0))
    transposed = kernel.astype(dtype).swapaxes(1, 2)  # once, and not in the loop

    def step(gradient, now):
        """Goes on to the gradient of the state before; gives that of the state after."""
        of_sums, of_before = (jnp.stack(pair) for pair in now)
        back = _products(of_sums * jnp.tile(gradient, 3), transposed, dtype)
        return gradient * of_before + back, gradient

    _, after = lax.scan(step, gradient, (_in_turn(*of_sums), _in_turn(*of_before)), reverse=True)

    of_inputs, of_kernel, of_bias = [], [], []
    for h, gradients, by_n, by_sums in zip(states, _in_place(after), of_n, of_sums, strict=True):
        rows = by_sums * jnp.tile(gradients, 3)
        of_kernel.append(kernels.outer(h, rows, dtype))
        of_bias.append(jnp.sum(rows, axis=(0, 1)))
        of_inputs += [rows[..., : 2 * h.shape[-1]], by_n * gradients]
    return jnp.concatenate(of_inputs, axis=-1), None, jnp.stack(of_kernel), jnp.stack(of_bias)[:, None]


_scan.defvjp(_scan_forward, _scan_backward)
