"""Layers shared by all models: dropout's rates, matrix products, attention over texts of different lengths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtl.models import kernels, layers

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


def test_draws_are_those_of_murmurhash():
    """By its reference code, smhasher's `fmix32`."""
    np.testing.assert_array_equal(
        kernels._mixed(jnp.array([0, 1, 2, 0xFFFFFFFF], jnp.uint32)),
        np.array([0, 0x514E28B7, 0x30F4C306, 0x81F16F39], np.uint32),
    )


def test_rates_of_none_and_of_all():
    x = jnp.ones((4, 5))
    np.testing.assert_array_equal(kernels.dropout(x, 0.0, KEY), x)
    np.testing.assert_array_equal(kernels.dropout(x, 1.0, KEY), jnp.zeros_like(x))
    np.testing.assert_array_equal(kernels.dropout(x, 0.5, None), x)


def test_nothing_is_kept_for_dropout_but_its_key():
    """Neither random bits nor a mask, which of attention would be as large as the scores."""
    x = jax.ShapeDtypeStruct((64, 64, 1024), jnp.float32)
    loss = jax.value_and_grad(lambda x, key: jnp.sum(jnp.square(kernels.dropout(x, 0.1, key))))
    memory = jax.jit(loss).lower(x, KEY).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.size // 4


def test_gelu_is_the_exact_one_in_value_and_gradient():
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    values, gradients = jax.vmap(jax.value_and_grad(layers.gelu))(jnp.asarray(x))
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)])
    density = np.exp(-0.5 * x.astype(float) ** 2) / math.sqrt(2 * math.pi)
    # Two units in the last place of 1, which the error function ends at, times the |x| of up to 5 where it still moves.
    np.testing.assert_allclose(values, x * below, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients, below + x * density, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_dtype(dtype):
    assert kernels.dropout(jnp.ones((4, 5), dtype), 0.3, KEY).dtype == dtype


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
