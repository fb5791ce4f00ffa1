"""Layers shared by all models: dense, layer norm, attention.

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

from jaxtl.models import kernels

trunc_normal = nnx.initializers.truncated_normal(0.02)  # the initialisation of BERT and ViT

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": kernels.gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


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
        bias = None if self.bias is None else self.bias[...]
        return kernels.matmul(x, self.kernel[...], bias, self.dtype).astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al., 2016), statistics in float32."""

    def __init__(self, width: int, *, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self.normalised(x) * self.scale[...] + self.bias[...]).astype(self.dtype)

    def normalised(self, x: jax.Array) -> jax.Array:
        """Returns what comes before scale and bias, float32."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return centred * lax.rsqrt(variance + self.epsilon)


def split(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """Splits a dropout key, or hands on its absence."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al., 2017): [batch, tokens, width] -> the same.

    With `lengths`, int32 [batch] and at least 1, no token takes anything from those beyond its example's length.
    With `leading`, only the first so many tokens ask: the result is [batch, leading, width].
    With `norm`, the input goes through it first.
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

    def __call__(
        self,
        x: jax.Array,
        rng: jax.Array | None = None,
        lengths: jax.Array | None = None,
        leading: int | None = None,
        norm: LayerNorm | None = None,
    ) -> jax.Array:
        if leading is not None:
            return self.output(self._of_few(x, rng, lengths, leading, norm))
        x = x if norm is None else norm(x)
        batch, tokens, width = x.shape
        query, key, value = (
            y.reshape(batch, tokens, self.heads, -1) for y in (self.query(x), self.key(x), self.value(x))
        )
        mixed = kernels.attention(query, key, value, rng, lengths, self.dropout)
        return self.output(mixed.reshape(batch, tokens, width))

    def _of_few(
        self, x: jax.Array, rng: jax.Array | None, lengths: jax.Array | None, leading: int, norm: LayerNorm | None
    ) -> jax.Array:
        """Returns what the leading tokens take from all of `x`; neither keys nor values are made.

        With q = W_q a, the score of a token x is q . (W_k x) = (W_k^T q) . x, and the sum of p W_v x is W_v (sum of p
        x): the kernels meet each asking token once, and not every token. So do scale and bias of the norm before, whose
        gradients would otherwise be sums over all tokens. The key's bias, and the norm's by way of the key, add the
        same to all scores of a query, which softmax takes away again.
        """
        width = x.shape[-1]
        x, scale, shift = (x, 1, 0) if norm is None else (norm.normalised(x), norm.scale[...], norm.bias[...])
        asking = x[:, :leading] * scale + shift

        def by_head(kernel: nnx.Param) -> jax.Array:  # -> [width, heads, width / heads]
            return kernel[...].reshape(width, self.heads, -1)

        query = self.query(asking).reshape(*asking.shape[:2], self.heads, -1)
        query = kernels.einsum("brhd,chd->bhrc", query, by_head(self.key.kernel), self.dtype) * scale
        # Tokens before heads: on a CPU the products with all tokens, and their gradients, then take half as long.
        scores = kernels.einsum("btc,bhrc->bthr", x, query, self.dtype).transpose(0, 2, 3, 1)
        weights = kernels.attention_weights(scores / math.sqrt(width // self.heads), rng, lengths, self.dropout)
        mixed = kernels.einsum("bthr,btc->bhrc", weights.transpose(0, 3, 1, 2), x, self.dtype)
        total = jnp.sum(weights, axis=-1, keepdims=True)  # dropout leaves weights that do not sum to one
        mixed = mixed * scale + total * shift
        mixed = kernels.einsum("bhrc,chd->brhd", mixed, by_head(self.value.kernel), self.dtype)
        if self.value.bias is not None:
            mixed = mixed + total.swapaxes(1, 2) * self.value.bias[...].reshape(self.heads, -1)
        return mixed.reshape(asking.shape).astype(self.dtype)


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
