"""Layers shared by all models: dropout's rates, matrix products, attention over texts of different lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtl.models import kernels, layers

KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 1000), (1000, 10, 101)], ids=["even", "odd"])
def test_dropout_zeroes_at_its_rate_and_keeps_the_expectation(rate, shape):
    dropped = np.asarray(kernels.dropout(jnp.ones(shape), rate, KEY))
    count = dropped.size
    # Five standard errors of a proportion over a million draws.
    assert abs((dropped == 0).mean() - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - round(rate * 65536) / 65536), rtol=1e-6)


def test_neighbouring_entries_are_dropped_independently():
    """Two entries share 32 random bits: the halves must not be related, nor the rows."""
    kept = np.asarray(kernels.dropout(jnp.ones((1000, 1000)), 0.5, KEY)) != 0
    for left, right in ((kept[:, :-1:2], kept[:, 1::2]), (kept[:, 1:-1], kept[:, 2:]), (kept[:-1], kept[1:])):
        # Both are kept in a quarter of the cases, five standard errors.
        assert abs((left & right).mean() - 0.25) < 5 * (0.25 * 0.75 / left.size) ** 0.5


def test_rates_that_round_to_none_and_to_all():
    x = jnp.ones((4, 5))
    np.testing.assert_array_equal(kernels.dropout(x, 0.0, KEY), x)
    np.testing.assert_array_equal(kernels.dropout(x, 1e-6, KEY), x)
    np.testing.assert_array_equal(kernels.dropout(x, 1.0 - 1e-6, KEY), jnp.zeros_like(x))
    np.testing.assert_array_equal(kernels.dropout(x, 1.0, KEY), jnp.zeros_like(x))
    np.testing.assert_array_equal(kernels.dropout(x, 0.5, None), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_dtype(dtype):
    assert kernels.dropout(jnp.ones((4, 5), dtype), 0.3, KEY).dtype == dtype


def test_product_with_a_transposed_kernel_is_the_same_in_value_and_gradients():
    random = np.random.default_rng(0)
    x, kernel, direction = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), (8, 5), (2, 3, 5))
    )

    def loss(x, kernel, axis):
        return jnp.sum(kernels.matmul(x, kernel, jnp.float32, axis) * direction)

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
