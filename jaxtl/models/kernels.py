"""The arithmetic that models spend their time in, and all that depends on the backend.

Operands of products are cast to the compute dtype and accumulate in float32; softmax is float32.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

# Attention scores of a batch larger than this, on a CPU, do not stay in its caches: they are made for a few examples at
# a time, as many as fit in the second figure. Bytes.
_SCORES_AT_ONCE, _SCORES_OF_A_PART = 16 * 2**20, 4 * 2**20


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the product that `spec` names as `matmul` does: float32, operands cast to `dtype`, in its gradients too.

    Every index of `spec` is in at least two of its three terms, so that the gradients are einsums of the same kind.
    Each has the dtype of its operand.
    """
    a, b = a.astype(dtype), b.astype(dtype)
    if jax.default_backend() == "cpu":
        # XLA's CPU backend has no product of bfloat16 operands in some of the layouts (jax 0.10.2: "Unsupported element
        # type for DotThunk"). Those of float32 copies are the same: bfloat16 products are exact in float32.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_forward(spec, a, b, dtype):
    return einsum(spec, a, b, dtype), (a, b)


def _einsum_backward(spec, dtype, saved, gradient):
    a, b = saved
    of_a, of_b, of_result = spec.replace("->", ",").split(",")
    a_gradient = einsum(f"{of_result},{of_b}->{of_a}", gradient, b, dtype)
    b_gradient = einsum(f"{of_a},{of_result}->{of_b}", a, gradient, dtype)
    return a_gradient.astype(a.dtype), b_gradient.astype(b.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


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


_PLAIN = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Within it, `attention` is traced as the products that define it, on every backend."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rng: jax.Array | None,
    lengths: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Returns scaled dot-product attention, [batch, tokens, heads, width of a head] in the dtype of `query`.

    Args:
        query, key, value: [batch, tokens, heads, width of a head], in the compute dtype.
        rng: dropout key; None turns dropout off.
        lengths: int32 [batch], at least 1: tokens beyond have no part in it. None: all have.
        rate: of dropout on the weights.
    """
    random, plain = rng is not None and rate > 0, _PLAIN.get()
    if not random and not plain and _cudnn(query):
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    # Heads before tokens: on a CPU three times as fast as the other way round, elsewhere the same.
    operands = tuple(x.swapaxes(1, 2) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    scores = 4 * heads * tokens**2  # bytes, of an example
    if random or plain or jax.default_backend() != "cpu" or batch * scores <= _SCORES_AT_ONCE:
        mixed = _attend(*operands, rng, lengths, rate)
    else:
        size = max((n for n in range(1, batch + 1) if batch % n == 0 and n * scores <= _SCORES_OF_A_PART), default=1)
        parts = jax.tree.map(lambda x: x.reshape(batch // size, size, *x.shape[1:]), (*operands, lengths))
        # The backward pass makes the scores again rather than read them all from memory.
        attend = jax.checkpoint(lambda part: _attend(*part[:3], None, part[3], 0.0))
        mixed = lax.map(attend, parts).reshape(operands[0].shape)
    return mixed.swapaxes(1, 2)


def attention_weights(scores: jax.Array, rng: jax.Array | None, lengths: jax.Array | None, rate: float) -> jax.Array:
    """Returns softmax over the last axis, then dropout: [batch, heads, queries, tokens] float32 -> the same.

    Args:
        scores: already scaled.
        rng, lengths, rate: see `attention`.
    """
    if lengths is not None:
        within = jnp.arange(scores.shape[-1]) < lengths[:, None]  # [batch, tokens]
        # Finite, so that no difference is NaN; its exponential is exactly zero.
        scores = jnp.where(within[:, None, None], scores, -1e30)
    return dropout(jax.nn.softmax(scores, axis=-1), rate, rng)


def _attend(query, key, value, rng, lengths, rate):
    """`attention` with heads before tokens."""
    scores = einsum("bhqd,bhkd->bhqk", query, key, query.dtype)
    weights = attention_weights(scores / math.sqrt(query.shape[-1]), rng, lengths, rate)
    return einsum("bhqk,bhkd->bhqd", weights, value, query.dtype).astype(query.dtype)


def _cudnn(query: jax.Array) -> bool:
    """Whether cuDNN's fused attention, which has no float32, takes operands like this one."""
    if jax.default_backend() != "gpu" or query.dtype != jnp.bfloat16:
        return False
    device, width = jax.devices()[0], query.shape[-1]
    capable = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0  # Ampere
    return capable and width % 8 == 0 and width <= 128
