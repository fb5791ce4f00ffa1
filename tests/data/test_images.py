"""Resizing against torch; augmentation against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtl.data import images


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def torch_resize(pixels: np.ndarray, size: int, antialias: bool = False) -> np.ndarray:
    channels_first = torch.tensor(pixels).float().permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        channels_first, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias
    )
    return resized.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("height", "width", "size", "antialias"),
    [(32, 32, 224, False), (20, 31, 98, False), (32, 32, 32, False), (64, 64, 24, True)],
    ids=["enlarge", "stretch", "identity", "shrink"],
)
def test_resizing_is_that_of_torch(height, width, size, antialias):
    pixels = random_pixels(3, height, width, 3)
    ours = images.preprocess(jnp.asarray(pixels), size, "unit")
    assert ours.shape == (3, size, size, 3)
    # Pixels up to 255 in float32: a handful of roundings of 255 * 2**-24, divided by 255.
    np.testing.assert_allclose(ours, torch_resize(pixels, size, antialias) / 255, atol=1e-6)


def test_equal_size_changes_nothing_but_the_scale():
    pixels = random_pixels(2, 16, 16, 3)
    unit = images.preprocess(jnp.asarray(pixels), 16, "unit")
    np.testing.assert_allclose(unit, pixels.astype(np.float32) / 255, rtol=2e-7)
    assert np.array_equal(np.round(np.asarray(unit) * 255), pixels)


@pytest.mark.parametrize(
    ("scale", "black", "white"),
    [
        ("unit", (0, 0, 0), (1, 1, 1)),
        ("half", (-1, -1, -1), (1, 1, 1)),
        # (0 - mean) / deviation and (1 - mean) / deviation of ImageNet, to four places.
        ("imagenet", (-2.1179, -2.0357, -1.8044), (2.2489, 2.4286, 2.6400)),
    ],
)
def test_scales_map_black_and_white_to_their_ends(scale, black, white):
    pixels = jnp.stack([jnp.zeros((4, 4, 3), jnp.uint8), jnp.full((4, 4, 3), 255, jnp.uint8)])
    scaled = images.preprocess(pixels, 8, scale)
    np.testing.assert_allclose(scaled[0, 3, 5], black, atol=1e-4)
    np.testing.assert_allclose(scaled[1, 3, 5], white, atol=1e-4)


def test_pixels_are_not_rounded_to_whole_numbers_after_resizing():
    step = np.zeros((1, 1, 2, 3), np.uint8)
    step[:, :, 1] = 1
    # Four centres over two pixels: 0, a quarter, three quarters, 1.
    resized = images.preprocess(jnp.asarray(step), 4, "unit")[0, 0, :, 0] * 255
    np.testing.assert_allclose(resized, [0, 0.25, 0.75, 1], atol=1e-6)


def test_preprocess_returns_the_dtype_asked_for():
    pixels = jnp.asarray(random_pixels(1, 8, 8, 3))
    assert images.preprocess(pixels, 16, "half").dtype == jnp.float32
    assert images.preprocess(pixels, 16, "half", jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("call", [lambda x: images.preprocess(x, 8, "nope"), lambda x: images.augment(None, x, "nope")])
def test_an_unknown_name_is_an_error(call):
    with pytest.raises(ValueError, match="nope"):
        call(jnp.zeros((1, 8, 8, 3)))


# --- augmentation ----------------------------------------------------------------------------------------

augment = jax.jit(images.augment, static_argnames="kind")


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_augmentation_is_a_function_of_the_key(kind):
    batch = jnp.asarray(random_pixels(16, 12, 12, 3), jnp.float32)
    first = augment(jax.random.key(1), batch, kind)
    assert jnp.array_equal(first, augment(jax.random.key(1), batch, kind))
    assert not jnp.array_equal(first, augment(jax.random.key(2), batch, kind))
    assert first.shape == batch.shape
    assert first.dtype == batch.dtype


def test_none_returns_the_batch_itself():
    batch = jnp.ones((2, 4, 4, 3))
    assert images.augment(jax.random.key(0), batch, "none") is batch


def test_a_flip_mirrors_whole_images_and_about_half_of_them():
    batch = jnp.asarray(random_pixels(400, 4, 4, 3), jnp.float32)
    result = np.asarray(augment(jax.random.key(0), batch, "flip"))
    kept = (result == np.asarray(batch)).all((1, 2, 3))
    mirrored = (result == np.asarray(batch)[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 160 <= mirrored.sum() <= 240  # four deviations of a fair coin: 200 +- 4 * 10


def crops(count: int, size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the crops of a batch of coordinates: (top to bottom, left to right, whole result)."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    coordinates = np.stack([y, x, np.zeros_like(x)], -1).astype(np.float32)
    batch = jnp.asarray(np.broadcast_to(coordinates, (count, size, size, 3)))
    result = np.asarray(augment(jax.random.key(3), batch, "crop_flip"))
    # Between two neighbouring inner result pixels lies crop / size of a source pixel.
    steps_y = result[:, size // 2, 0, 0] - result[:, size // 2 - 1, 0, 0]
    steps_x = result[:, 0, size // 2, 1] - result[:, 0, size // 2 - 1, 1]
    return steps_y, steps_x, result


def test_crops_have_the_area_and_the_ratio_drawn_for_them():
    height, width, _ = crops(300)
    area, ratio = height * np.abs(width), np.abs(width) / height
    assert height.min() > 0
    assert max(height.max(), np.abs(width).max()) <= 1 + 1e-3
    # A width cut to 1 was sqrt(area * ratio) > 1, so that area > 3 / 4 and height = sqrt(area / ratio) >= 3 / 4:
    # neither bound is left by cutting.
    assert area.min() >= 0.35 - 1e-3
    assert area.max() <= 1 + 1e-3
    assert ratio.min() >= 3 / 4 - 1e-3
    assert ratio.max() <= 4 / 3 + 1e-3
    assert 0.4 < np.mean(width < 0) < 0.6  # mirrored
    assert len(np.unique(area)) > 290  # each example its own, up to the rounding of the coordinates


def test_crops_stay_inside_the_image_and_are_evenly_spaced():
    height, width, result = crops(50)
    assert result.min() >= 0
    assert result.max() <= 63
    # The source coordinate is affine in the result's, except where it is held at the outermost centres.
    for axis, step in ((0, height), (1, width)):
        line = result[:, :, 0, 0] if axis == 0 else result[:, 0, :, 1]
        inner = (line[:, 1:] > 0) & (line[:, 1:] < 63) & (line[:, :-1] > 0) & (line[:, :-1] < 63)
        np.testing.assert_allclose(np.diff(line)[inner], np.broadcast_to(step[:, None], inner.shape)[inner], atol=1e-3)


def test_a_crop_of_a_constant_image_is_that_image():
    batch = jnp.full((8, 10, 10, 3), 0.7)
    np.testing.assert_allclose(augment(jax.random.key(0), batch, "crop_flip"), batch, rtol=1e-6)


def test_a_crop_is_bilinear_interpolation_as_torch_samples_it():
    batch = jnp.asarray(random_pixels(6, 24, 24, 3), jnp.float32)
    coordinates = jnp.stack(jnp.meshgrid(jnp.arange(24.0), jnp.arange(24.0), indexing="ij"), -1)
    # The same key draws the same crops: sampling coordinates tells where each result pixel was taken.
    where = jnp.broadcast_to(jnp.concatenate([coordinates, coordinates[..., :1]], -1), batch.shape)
    where = np.asarray(augment(jax.random.key(5), where, "crop_flip"))[..., :2]
    grid = torch.tensor(where[..., ::-1].copy()) * 2 / 23 - 1  # x before y, [-1, 1] from centre to centre
    expected = torch.nn.functional.grid_sample(
        torch.tensor(np.asarray(batch)).permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=True
    )
    ours = augment(jax.random.key(5), batch, "crop_flip")
    # Coordinates of up to 23 carry errors of some 1e-6 of a pixel, times differences of up to 255.
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=5e-3)


def test_one_compilation_serves_every_key_and_batch():
    traces = []

    @jax.jit
    def step(key, pixels):
        traces.append(1)
        return images.augment(key, images.preprocess(pixels, 16, "unit"), "crop_flip")

    for seed in range(3):
        step(jax.random.key(seed), jnp.asarray(random_pixels(4, 8, 8, 3) + np.uint8(seed))).block_until_ready()
    assert len(traces) == 1
