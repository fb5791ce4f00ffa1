"""Winograd's convolutions against the definition in float64, and where they are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtl.models import kernels, winograd

WIDE = (128, 64)  # channels: enough for it to gain
ON_ONE_CPU = pytest.mark.skipif(jax.default_backend() != "cpu" or jax.device_count() > 1, reason="it is for one CPU")


def arrays(batch, height, width, inputs, outputs):
    random = np.random.default_rng(0)
    kernel = random.standard_normal((3, 3, inputs, outputs)) / (9 * inputs) ** 0.5  # results of the size of the input
    return (
        random.standard_normal((batch, height, width, inputs)).astype(np.float32),
        kernel.astype(np.float32),
        random.standard_normal((batch, height, width, outputs)).astype(np.float32),
    )


def shifted(x):
    """[batch, height, width, channels] -> (i, j, the entry there of every 3x3 neighbourhood)."""
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return [(i, j, padded[:, i : i + height, j : j + width]) for i in range(3) for j in range(3)]


def defined(x, kernel, direction):
    """The convolution and the gradients of its product with `direction`, by the definition, in float64."""
    kernel, direction = kernel.astype(np.float64), direction.astype(np.float64)
    value = sum(part @ kernel[i, j] for i, j, part in shifted(x))
    of_kernel = np.zeros(kernel.shape)
    for i, j, part in shifted(x):
        of_kernel[i, j] = np.einsum("bhwc,bhwk->ck", part, direction)
    of_x = sum(part @ kernel[2 - i, 2 - j].T for i, j, part in shifted(direction))
    return value, of_x, of_kernel


def computed(convolution, x, kernel, direction):
    def loss(x, kernel):
        y = convolution(x, kernel)
        return jnp.sum(y.astype(jnp.float32) * direction), y

    (of_x, of_kernel), value = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
    return value, of_x, of_kernel


def off(ours, exact):
    """The largest errors, by the largest value of each."""
    return [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("shape", [(2, 4, 6, 8, 5), (1, 2, 2, 3, 4), (3, 14, 14, 64, 128), (5, 6, 2, 1, 1)])
def test_value_and_gradients_are_those_of_the_definition(shape):
    """Sums of up to 9 * 128 products: by the definition, float32 is off by up to 1e-6 of the largest value."""
    x, kernel, direction = arrays(*shape)
    assert max(off(computed(winograd.convolution, x, kernel, direction), defined(x, kernel, direction))) < 4e-6


def test_batch_is_gone_through_in_parts_of_equal_size(monkeypatch):
    x, kernel, direction = arrays(6, 8, 8, 16, 8)
    whole = computed(winograd.convolution, x, kernel, direction)
    sums = 16 * 8 * 8 * 16  # bytes, of an image: four for each entry, of four bytes
    for images, parts in ((0, 6), (1, 6), (2, 3), (4, 2), (5, 2), (6, 1)):
        monkeypatch.setattr(winograd, "_SUMS_OF_A_PART", images * sums)
        assert winograd._parts(x, x.shape).shape[0] == parts
        found = computed(lambda x, kernel: winograd.convolution(x, kernel), x, kernel, direction)
        traced = str(jax.make_jaxpr(lambda x, kernel: winograd.convolution(x, kernel))(x, kernel))
        assert f"length={parts}" in traced
        assert max(off(found, [np.asarray(value, np.float64) for value in whole])) < 2e-6


@ON_ONE_CPU
def test_multiplications_are_four_ninths_of_the_definitions():
    x, kernel, _ = arrays(16, 8, 8, *WIDE)

    def operations(convolution):
        return jax.jit(convolution).lower(x, kernel).cost_analysis()["flops"]

    ours = operations(lambda x, kernel: kernels.convolution(x, kernel, jnp.float32))
    # Zeros around a plane of 8 are not multiplied by the definition: a sixth of it. Sums cost a sixth of the products.
    assert ours < 0.65 * operations(lambda x, kernel: defined_by_lax(x, kernel))
    with kernels.plain():
        plain = operations(lambda x, kernel: kernels.convolution(x, kernel, jnp.float32))
    assert plain > 0.99 * operations(lambda x, kernel: defined_by_lax(x, kernel))


def defined_by_lax(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(17, 8, 8, *WIDE), (2, 7, 8, *WIDE), (2, 8, 8, 3, 64)], ids=["wide", "odd", "narrow"]
)
def test_convolution_of_every_shape_is_that_of_the_operands_in_the_compute_dtype(shape, dtype):
    x, kernel, direction = arrays(*shape)
    exact = defined(*(np.asarray(jnp.asarray(value).astype(dtype), np.float32) for value in (x, kernel)), direction)
    value, of_x, of_kernel = computed(lambda x, kernel: kernels.convolution(x, kernel, dtype), x, kernel, direction)
    assert value.dtype == dtype
    assert (of_x.dtype, of_kernel.dtype) == (jnp.float32, jnp.float32)
    # The direction is rounded to the dtype as well; of bfloat16 half a unit in the last place is 2**-9.
    assert max(off((value, of_x, of_kernel), exact)) < (4e-6 if dtype == jnp.float32 else 2**-7)


@ON_ONE_CPU
@pytest.mark.parametrize(
    ("shape", "taken"),
    [((16, 8, 8, *WIDE), True), ((15, 8, 8, *WIDE), False), ((32, 7, 8, *WIDE), False), ((16, 8, 8, 64, 64), False)],
)
def test_it_is_taken_where_sides_are_even_and_channels_many(shape, taken):
    x, kernel, _ = arrays(*shape)
    traced = str(jax.make_jaxpr(lambda x, kernel: kernels.convolution(x, kernel, jnp.float32))(x, kernel))
    assert ("conv_general_dilated" in traced) != taken
