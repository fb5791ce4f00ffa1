"""Layers shared by all models: dropout's rates, matrix products, attention over texts of different lengths."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtl.models import kernels, layers, stages

ON_ONE_CPU = pytest.mark.skipif(jax.default_backend() != "cpu" or jax.device_count() > 1, reason="it is for one CPU")
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1_000_000,), (1000, 10, 101)])
def test_dropout_zeroes_at_its_rate_and_keeps_the_expectation(rate, shape):
    dropped = np.asarray(kernels.dropout(jnp.ones(shape), rate, KEY))
    count = dropped.size
    # Five standard errors of a proportion over a million draws.
    assert abs((dropped == 0).mean() - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)


def agree(left, right):
    """Whether both of two masks, each true in half of the cases, are true in a quarter: five standard errors."""
    return abs((left & right).mean() - 0.25) < 5 * (0.25 * 0.75 / left.size) ** 0.5


def test_entries_are_dropped_independently_of_one_another():
    kept = np.asarray(kernels.dropout(jnp.ones((1024, 1000)), 0.5, KEY)) != 0
    for distance in (1, 2, 3, 4, 16, 100, 512):
        assert agree(kept[:, :-distance], kept[:, distance:])
        assert agree(kept[:-distance], kept[distance:])


def test_keys_drop_independently_of_one_another():
    keys = jax.random.split(KEY, 2000)
    kept = np.asarray(jax.vmap(lambda key: kernels.dropout(jnp.ones(500), 0.5, key))(keys)) != 0
    for distance in (1, 2, 1000):
        assert agree(kept[:-distance], kept[distance:])
    # Every entry by its own: 2,000 draws of each. Six standard errors, as there are 500 of them.
    assert np.abs(kept.mean(axis=0) - 0.5).max() < 6 * (0.25 / len(kept)) ** 0.5


def test_words_are_mixed_as_in_murmurhash():
    """By its reference code, smhasher's `fmix32`."""
    np.testing.assert_array_equal(
        kernels._mixed(jnp.array([0, 1, 2, 0xFFFFFFFF], jnp.uint32)),
        np.array([0, 0x514E28B7, 0x30F4C306, 0x81F16F39], np.uint32),
    )


def test_rates_that_round_to_none_and_to_all():
    x = jnp.ones((4, 5))
    for rate in (0.0, 1e-12):
        np.testing.assert_array_equal(kernels.dropout(x, rate, KEY), x)
    for rate in (1.0 - 1e-12, 1.0):
        np.testing.assert_array_equal(kernels.dropout(x, rate, KEY), jnp.zeros_like(x))
    np.testing.assert_array_equal(kernels.dropout(x, 0.5, None), x)


def kept_arrays(loss, *arguments):
    """Returns the dtypes and shapes of all arrays that a compiled gradient writes to memory."""
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile(kernels.compiler_options("float32")).as_text()
    entry = program[program.index("\nENTRY") :]
    return re.findall(r"= (\w+)\[([\d,]*)\]", entry)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA keeps is its own choice on every backend")
def test_a_cpu_keeps_neither_random_bits_nor_a_mask_of_dropout():
    """Of attention a mask would be as many entries as there are scores."""
    kernel = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def loss(first, second):
        hidden = kernels.matmul(jnp.ones((256, 64)), first, None, jnp.float32)
        return jnp.sum(jnp.square(kernels.matmul(kernels.dropout(hidden, 0.1, KEY), second, None, jnp.float32)))

    written = kept_arrays(loss, kernel, kernel)
    assert ("f32", "256,64") in written
    assert not {(dtype, "256,64") for dtype in ("pred", "u32", "u16", "u8")} & set(written)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA keeps is its own choice on every backend")
def test_a_cpu_keeps_of_gelu_what_goes_in_and_what_comes_out():
    def loss(first, second):
        hidden = kernels.matmul(jnp.ones((256, 48)), first, None, jnp.float32)
        return jnp.sum(jnp.square(kernels.matmul(kernels.gelu(hidden), second, None, jnp.float32)))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((48, 96), (96, 48))]
    # The product, GELU of it, and their two gradients.
    assert kept_arrays(loss, *shapes).count(("f32", "256,96")) == 4


def test_gelu_is_the_exact_one_in_value_and_gradient():
    values, gradients, exact, slope = gelu(jnp.float32)
    # Two units in the last place of 1, which the error function ends at, times the |x| of up to 5 where it still moves.
    np.testing.assert_allclose(values, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients, slope, atol=1e-6)


def test_gelu_of_bfloat16_is_rounded_once():
    values, gradients, exact, slope = gelu(jnp.bfloat16)
    # Eight bits: half a unit in the last place is 2**-9 of a value.
    np.testing.assert_allclose(values, exact, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(gradients, slope, rtol=2**-8, atol=1e-6)


def gelu(dtype):
    """Returns ours, and those of double precision: values and derivatives."""
    x = jnp.linspace(-12, 12, 2001).astype(dtype)
    values, gradients = jax.vmap(jax.value_and_grad(kernels.gelu))(x)
    x = np.asarray(x, float)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return np.asarray(values, float), np.asarray(gradients, float), x * below, below + x * density


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_dtype_and_rounds_once(dtype):
    x = jnp.arange(1, 101).astype(dtype)
    dropped = kernels.dropout(x, 0.1, KEY)
    assert dropped.dtype == dtype
    dropped, once = np.asarray(dropped, float), np.asarray((np.asarray(x, float) / 0.9).astype(dtype), float)
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, once), rtol=2e-7)  # the factor is float32


def test_product_with_a_transposed_kernel_is_the_same_in_value_and_gradients():
    random = np.random.default_rng(0)
    x, kernel, direction = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), (8, 5), (2, 3, 5))
    )

    def loss(x, kernel, axis):
        return jnp.sum(kernels.matmul(x, kernel, None, jnp.float32, axis) * direction)

    ours = jax.value_and_grad(loss, (0, 1))(x, kernel.T, 1)
    expected = jax.value_and_grad(lambda x, kernel: jnp.sum(x @ kernel * direction), (0, 1))(x, kernel)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1][0], expected[1][0], atol=1e-5)
    np.testing.assert_allclose(ours[1][1].T, expected[1][1], atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="nothing is said to XLA elsewhere")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_xla_knows_what_it_is_told_on_a_cpu(precision):
    """What it does not know is left out, so that a newer XLA can be used: here it must not be."""
    assert len(kernels.compiler_options(precision)) == {"float32": 2, "bfloat16": 1}[precision]


def gradient_of_an_mlp(precision):
    """Returns the compiled gradients, of parameters and input, of two dense layers, 96 and 160 wide: 8 x 16 rows."""
    dtype = jnp.dtype(precision)
    structure, params = nnx.split(layers.Mlp(96, 160, activation="gelu", dtype=dtype, rngs=nnx.Rngs(0)))

    def loss(params, x):
        return jnp.sum(jnp.square(nnx.merge(structure, params)(x)))

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(params, jax.ShapeDtypeStruct((8, 16, 96), dtype))
    return lowered.compile(kernels.compiler_options(precision))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is XLA's CPU backend that would")
def test_no_operand_of_a_product_is_transposed_on_a_cpu():
    """XLA would do it entry by entry, across the caches, computing GELU anew on the way: a tenth of a BERT step."""
    program = gradient_of_an_mlp("float32").as_text()
    assert "f32[128,160]" in program
    assert not {"f32[160,128]", "f32[96,128]"} & set(re.findall(r"f32\[[\d,]*\]", program))


@ON_ONE_CPU
@pytest.mark.parametrize(("batch", "tokens", "size"), [(8, 256, 8), (64, 256, 8), (12, 400, 4), (7, 400, 4), (4, 1, 4)])
def test_forward_passes_take_as_many_examples_at_a_time_as_have_2048_tokens(batch, tokens, size):
    x = stages.Sequence(jnp.arange(batch * 3.0).reshape(batch, 3), jnp.arange(batch))
    seen = []

    def function(part):
        seen.append(part.values.shape[0])
        return part._replace(values=2 * part.values[:, :, None])

    found = jax.jit(lambda x: kernels.in_parts(function, x, tokens))(x)
    assert set(seen) == {size}
    np.testing.assert_array_equal(found.values, 2 * x.values[:, :, None])
    np.testing.assert_array_equal(found.lengths, x.lengths)


@ON_ONE_CPU
def test_every_product_of_a_gradient_in_bfloat16_has_operands_of_bfloat16_on_a_cpu():
    """XLA would make the kernels' gradients of float32 copies, which takes twice as long."""
    program = gradient_of_an_mlp("bfloat16").as_text()
    operands = re.findall(r" dot\((.*?)\)", program)
    assert len(operands) == 6  # two forwards, and two for the gradients of each
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", program))
    assert {types[name] for pair in operands for name in pair.split(", ")} == {"bf16"}


def test_gradient_of_the_bias_is_the_sum_over_all_rows():
    random = np.random.default_rng(0)
    x, direction = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), (2, 3, 5)))

    def gradient(dtype):
        dense = layers.Dense(8, 5, dtype=dtype, rngs=nnx.Rngs(0))
        structure, params = nnx.split(dense)
        loss = jax.grad(lambda params: jnp.sum(nnx.merge(structure, params)(x) * direction))
        return loss(params)["bias"][...]

    np.testing.assert_allclose(gradient(jnp.float32), direction.sum((0, 1)), atol=1e-6)
    # Each of six values is rounded to 8 bits, and their sum is not.
    rounded = np.asarray(direction.astype(jnp.bfloat16).astype(jnp.float32)).sum((0, 1))
    np.testing.assert_allclose(gradient(jnp.bfloat16), rounded, atol=1e-6)
    assert gradient(jnp.bfloat16).dtype == jnp.float32


def attention(dtype=jnp.float32):
    return layers.Attention(16, 2, dtype=dtype, rngs=nnx.Rngs(0))


def test_tokens_beyond_the_length_get_no_weight_and_no_gradient():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.float32)
    lengths = jnp.array([6, 2])
    layer = attention()
    y = layer(x, lengths=lengths)
    np.testing.assert_allclose(y[0], layer(x)[0], atol=1e-6)
    np.testing.assert_allclose(y[1, :2], layer(x[1:, :2])[0], atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(layer(x, lengths=lengths)[1, :2])))(x)
    assert np.abs(gradient[1, :2]).min() > 0
    assert np.abs(gradient[1, 2:]).max() == 0


def test_attention_without_lengths_has_no_mask():
    x = jax.ShapeDtypeStruct((2, 6, 16), jnp.float32)
    assert "select" not in str(jax.make_jaxpr(attention())(x))
