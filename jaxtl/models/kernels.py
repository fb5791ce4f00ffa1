"""The arithmetic that models spend their time in, and all that depends on the backend.

Operands of products are cast to the compute dtype and accumulate in float32; softmax is float32.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxtl.models import winograd

# Attention scores of a batch larger than this, on a CPU, do not stay in its caches: they are made for a few examples at
# a time, as many as fit in the second figure. Bytes.
_SCORES_AT_ONCE, _SCORES_OF_A_PART = 16 * 2**20, 4 * 2**20
# And in forward passes on a CPU, so many tokens at a time.
_TOKENS_OF_A_PART = 2048


@functools.cache
def compiler_options(precision: str) -> dict[str, str | bool]:
    """Returns what XLA is to be told when it compiles steps for this backend.

    On a CPU, two things. To copy only what has to be kept when an array is written in place: it copies the optimiser's
    moments in every step otherwise (jax 0.10.2: a twentieth of a BERT step). And in float32, not to hand groups of
    operations to YNNPACK. It gains some percent where all arrays stay in the caches, and loses where they do not
    (DINOv2 forwards take 1.25 times as long, BERT with its gradients the same); its products of bfloat16 take half the
    time of XLA's.

    Args:
        precision: `float32` or `bfloat16`, that of the products.
    """
    if jax.default_backend() != "cpu":
        return {}
    wanted: dict[str, str | bool] = {"xla_cpu_copy_insertion_use_region_analysis": True}
    if precision == "float32":
        wanted["xla_cpu_experimental_ynn_fusion_type"] = ""
    accepted = {}
    for name, value in wanted.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # of a version of XLA that has no such choice
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            accepted[name] = value
    return accepted


def _operand(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns `x` as products take it: in `dtype`, and on a CPU computed before, as a matrix of rows.

    XLA's CPU backend otherwise fuses the recomputation of LayerNorm and GELU into the copies that feed a product,
    element by element (jax 0.10.2: `copy_bitcast_fusion` in a profile; a third of a ViT step), and transposes an
    operand with several axes of rows before it sums over them (a tenth of a BERT step).
    """
    x = x.astype(dtype)
    if jax.default_backend() != "cpu":
        return x
    return lax.optimization_barrier(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _product(a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> jax.Array:
    return lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=jnp.float32)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    if jax.default_backend() == "cpu" and jax.device_count() == 1 and a.dtype == jnp.bfloat16:
        # In the layout that YNNPACK takes. Of a sum over rows XLA's CPU backend makes one of float32, which takes twice
        # as long. Not on several devices: what has its layout laid down is gathered from all of them.
        return _rows(_product(_rows(a.T), _rows(b), (1,), (0,)))
    leading = tuple(range(a.ndim - 1))
    return _product(a, b, leading, leading)


def _rows(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def outer(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the sum over all rows of their outer products, as `matmul` has the gradient of a kernel.

    Args:
        a, b: [..., n] and [..., m].
        dtype: compute dtype.

    Returns:
        [n, m] float32.
    """
    return _outer(_operand(a, dtype), _operand(b, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype, axis: int = 0) -> jax.Array:
    """Returns `x @ kernel + bias` in float32, operands of the product cast to `dtype`.

    The gradient of the kernel is float32 and never rounded to `dtype`; that of `x` has the dtype of `x`. That of the
    bias is the sum, in float32, of the gradient rounded to `dtype`: give a bias where the result is rounded to it too.

    Args:
        x: [..., inputs].
        kernel: [inputs, outputs] float32, or [outputs, inputs] where `axis` is 1.
        bias: float32 [outputs], or None.
        dtype: compute dtype.
        axis: the kernel's axis that is summed over. A transposed copy of an embedding table is never made.
    """
    return _matmul_forward(x, kernel, bias, dtype, axis)[0]


def _matmul_forward(x, kernel, bias, dtype, axis):
    rows = _operand(x, dtype)
    y = _product(rows, _operand(kernel, dtype), (rows.ndim - 1,), (axis,))
    y = y.reshape(*x.shape[:-1], kernel.shape[1 - axis])
    return y if bias is None else y + bias, (rows, kernel, bias, jnp.zeros(0, x.dtype))


def _matmul_backward(dtype, axis, saved, gradient):
    rows, kernel, bias, like = saved
    shape, gradient = gradient.shape[:-1], _operand(gradient, dtype)
    x_gradient = _product(gradient, _operand(kernel, dtype), (gradient.ndim - 1,), (1 - axis,))
    kernel_gradient = _outer(rows, gradient) if axis == 0 else _outer(gradient, rows)
    bias_gradient = None if bias is None else jnp.sum(gradient, tuple(range(rows.ndim - 1)), jnp.float32)
    return x_gradient.reshape(*shape, kernel.shape[axis]).astype(like.dtype), kernel_gradient, bias_gradient


matmul.defvjp(_matmul_forward, _matmul_backward)


_PLAIN = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, attention, convolutions and forward passes are traced alike on every backend: by their definition."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def convolution(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the 3x3 convolution with stride 1 and zeros around, so that the size stays, in `dtype`.

    On a CPU by Winograd's algorithm where it gains (jax 0.10.2: VGG19's wide layers take half as long). On accelerators
    the choice is that of their libraries.

    Args:
        x: [batch, height, width, inputs].
        kernel: [3, 3, inputs, outputs] float32.
        dtype: compute dtype.
    """
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if jax.default_backend() == "cpu" and jax.device_count() == 1 and not _PLAIN.get() and winograd.takes(x, kernel):
        # Sums of bfloat16 have more digits than it has.
        return winograd.convolution(x, kernel.astype(jnp.float32)).astype(dtype)
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


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


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns the Gaussian error linear unit (Hendrycks and Gimpel, 2016), computed in float32: any shape -> the same.

    By the error function; by the complementary one, as in `jax.nn.gelu`, a CPU takes twice as long.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_below(y)).astype(x.dtype)


def _normal_below(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    # XLA's CPU backend would find that the forward pass has the same error function, and keep all of it.
    y = (lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x).astype(jnp.float32)
    slope = _normal_below(y) + y * jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability `rate` and divides the rest by the probability to stay.

    Identity without a key.

    The draws are a hash of the entries' indices, by two words that jax.random draws from the key (entries 2**32 apart
    share one). It is computed for an entry alone, where it is used, so that arrays may be split among devices and XLA
    need not keep it; jax.random's own bits for all entries took a twentieth of a BERT step on a CPU, and a third of its
    compilation.

    Args:
        x: any shape.
        rate: from 0 to 1, in steps of 2**-32.
        key: what fixes the draw.
    """
    dropped = round(rate * 2**32)  # of 2**32 equally likely draws
    if key is None or dropped == 0:
        return x
    if dropped == 2**32:
        return jnp.zeros_like(x)
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    index = sum(lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(s) for axis, s in enumerate(strides))
    draws = _mixed(_mixed(index ^ first) + second)
    kept = x.astype(jnp.float32) * (2**32 / (2**32 - dropped))
    return jnp.where(draws >= jnp.uint32(dropped), kept, 0.0).astype(x.dtype)


def _mixed(x: jax.Array) -> jax.Array:
    """Permutes uint32 so that every bit depends on all: the last step of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def in_parts(function: Callable[[Any], Any], x: Any, tokens: int) -> Any:
    """Returns `function(x)`, in which no example depends on another; on a CPU, of some examples after the others.

    What all layers make of a few stays in its caches (jax 0.10.2: of 64 images DINOv2's forward pass takes a twentieth
    less in float32 and a tenth in bfloat16, VGG19's a tenth), and takes less memory.

    Args:
        function: from arrays [batch, ..] in any structure to others.
        x: what it takes.
        tokens: of an example.
    """
    batch = jax.tree.leaves(x)[0].shape[0]
    if _PLAIN.get() or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return function(x)
    count = -(-batch // max(1, _TOKENS_OF_A_PART // tokens))
    if count == 1:
        return function(x)
    size = -(-batch // count)

    def parts(leaf: jax.Array) -> jax.Array:  # filled up with the last example
        filled = jnp.pad(leaf, ((0, count * size - batch), *[(0, 0)] * (leaf.ndim - 1)), mode="edge")
        return filled.reshape(count, size, *leaf.shape[1:])

    found = lax.map(function, jax.tree.map(parts, x))
    return jax.tree.map(lambda leaf: leaf.reshape(count * size, *leaf.shape[2:])[:batch], found)


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
        return _fused(query, key, value, lengths)
    # Heads before tokens: on a CPU three times as fast as the other way round, elsewhere the same.
    operands = tuple(x.swapaxes(1, 2) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    scores = 4 * heads * tokens**2  # bytes, of an example
    several = jax.default_backend() != "cpu" or jax.device_count() > 1  # of which each has its own examples
    if random or plain or several or batch * scores <= _SCORES_AT_ONCE:
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


def _fused(query, key, value, lengths):
    """`attention` by cuDNN, whose gradients exist for even numbers of tokens alone, as JAX calls it (0.10.2)."""
    batch, tokens = query.shape[:2]
    if tokens % 2:
        lengths = jnp.full(batch, tokens, jnp.int32) if lengths is None else lengths
        query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    return mixed[:, :tokens]


def _cudnn(query: jax.Array) -> bool:
    """Whether cuDNN's fused attention, which has no float32, takes operands like this one."""
    if jax.default_backend() != "gpu" or query.dtype != jnp.bfloat16:
        return False
    device, width = jax.devices()[0], query.shape[-1]
    capable = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0  # Ampere
    return capable and width % 8 == 0 and width <= 128
