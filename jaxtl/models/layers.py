"""Layers shared by all models: dense, layer norm, attention, dropout.

Parameters are float32. `dtype` is the compute dtype: operands of matrix products are cast to it, products accumulate
in float32, and activations between layers have it. Normalisation statistics and softmax are always float32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

trunc_normal = nnx.initializers.truncated_normal(0.02)  # the initialisation of BERT and ViT

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _product(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    if jax.default_backend() == "cpu":
        # XLA's CPU backend otherwise fuses the recomputation of LayerNorm and GELU into the copies that feed the
        # product, element by element (jax 0.10.2: `copy_bitcast_fusion` in a profile; a third of a ViT step).
        a, b = lax.optimization_barrier(a), lax.optimization_barrier(b)
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, axis: int = 0) -> jax.Array:
    """Returns `x @ kernel` in float32, operands cast to `dtype`.

    The gradient of the kernel is float32 and never rounded to `dtype`; that of `x` has the dtype of `x`.

    Args:
        x: [..., inputs].
        kernel: [inputs, outputs] float32, or [outputs, inputs] where `axis` is 1.
        dtype: compute dtype.
        axis: the kernel's axis that is summed over. A transposed copy of an embedding table is never made.
    """
    return _product(x.astype(dtype), kernel.astype(dtype), ((x.ndim - 1,), (axis,)))


def _matmul_forward(x, kernel, dtype, axis):
    return matmul(x, kernel, dtype, axis), (x, kernel)


def _matmul_backward(dtype, axis, saved, gradient):
    x, kernel = saved
    gradient = gradient.astype(dtype)
    rows = tuple(range(x.ndim - 1))
    x_gradient = _product(gradient, kernel.astype(dtype), ((x.ndim - 1,), (1 - axis,)))
    operands = (x.astype(dtype), gradient) if axis == 0 else (gradient, x.astype(dtype))
    kernel_gradient = _product(*operands, (rows, rows))
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nnx.Module):
    """`x @ kernel + bias`: [..., inputs] -> [..., outputs] in the compute dtype."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        init: nnx.Initializer = trunc_normal,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...], self.dtype)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al., 2016), statistics in float32."""

    def __init__(self, width: int, *, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]
        return y.astype(self.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability `rate` and divides the rest by the probability to stay.

    The rate is rounded to a multiple of 1 / 65536, and the division is by what was realised, so that the expectation
    is exact. Identity without a key.

    Args:
        x: [..., n].
        rate: from 0 to 1.
        key: what fixes the draw.
    """
    dropped = round(rate * 2**16)  # of 2**16 equally likely draws
    if key is None or dropped == 0:
        return x
    if dropped == 2**16:
        return jnp.zeros_like(x)
    # Two draws of 16 bits from each of 32: jax computes 32 for each entry even where 16 are asked for, and random bits
    # are a noticeable part of a step on a CPU. The leading axes stay as they are, for arrays split among devices.
    *leading, last = x.shape
    bits = jax.random.bits(key, (*leading, -(-last // 2)), jnp.uint32)
    draws = lax.bitcast_convert_type(bits, jnp.uint16).reshape(*leading, -1)[..., :last]
    return jnp.where(draws >= dropped, x * (2**16 / (2**16 - dropped)), 0.0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """Splits a dropout key, or hands on its absence."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al., 2017): [batch, tokens, width] -> the same.

    With `lengths`, int32 [batch] and at least 1, no token takes anything from those beyond its example's length.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        dense = functools.partial(Dense, width, width, dtype=dtype, rngs=rngs)
        self.query = dense(bias=qkv_bias)
        self.key = dense(bias=qkv_bias)
        self.value = dense(bias=qkv_bias)
        self.output = dense()
        self.heads = heads
        self.dropout = dropout
        self.dtype = dtype

    def __call__(self, x: jax.Array, rng: jax.Array | None = None, lengths: jax.Array | None = None) -> jax.Array:
        batch, tokens, width = x.shape

        def by_head(y: jax.Array) -> jax.Array:  # -> [batch, heads, tokens, width / heads]
            # Heads before tokens: on the CPU three times as fast as the (batch, tokens, heads, width) layout.
            return y.reshape(batch, tokens, self.heads, -1).transpose(0, 2, 1, 3)

        query, key, value = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores = scores / math.sqrt(width // self.heads)
        if lengths is not None:
            within = jnp.arange(tokens) < lengths[:, None]  # [batch, tokens]
            # Finite, so that no difference is NaN; its exponential is exactly zero.
            scores = jnp.where(within[:, None, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        weights = dropout(weights, self.dropout, rng).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
        return self.output(mixed.astype(self.dtype).transpose(0, 2, 1, 3).reshape(batch, tokens, width))


class Mlp(nnx.Module):
    """Dense, activation, dense: [..., width] -> the same."""

    def __init__(self, width: int, hidden: int, *, activation: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, width, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class SwiGlu(nnx.Module):
    """Gated MLP `(silu(x A) * x B) C` (Shazeer, 2020); A and B side by side in one kernel, as DINOv2 stores them."""

    def __init__(self, width: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc_in = Dense(width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.fc_out = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.fc_in(x), 2, axis=-1)
        return self.fc_out(jax.nn.silu(gate) * up)
