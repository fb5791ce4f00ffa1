"""Pixels on the device: resizing, scaling and augmentation, traced into the compiled step.

Images travel to the device as the uint8 they were decoded to and grow there: a 32x32 image is 3 KB, the 224x224
float32 image the model sees is 600 KB.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# (mean, deviation) per channel, for pixels in [0, 1]. ImageNet's are those of torchvision and transformers.
SCALES = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Random resized crop: share of the image's area, and width / height. The area of Inception's crop starts at 0.08,
# made for training from scratch; fine-tuning of pretrained models keeps the object in view.
_CROP_AREA = 0.35, 1.0
_CROP_RATIO = 3 / 4, 4 / 3


def preprocess(images: jax.Array, image_size: int, scale: str, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns the images as the model takes them.

    Bilinear with half-pixel centres, as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`
    when enlarging, antialiased when shrinking, the identity at equal size. Computed in float32 from start to end:
    there is no rounding back to uint8 between resizing and scaling, as there is in pipelines that resize with Pillow.

    Args:
        images: `[batch, height, width, 3]` uint8. Not square: stretched.
        image_size: side of the square result.
        scale: `unit`, `half` or `imagenet`, see `config.Images.scale`.
        dtype: of the result.

    Returns:
        `[batch, image_size, image_size, 3]`.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is none of {', '.join(SCALES)}")
    mean, deviation = jnp.asarray(SCALES[scale], jnp.float32)
    pixels = images.astype(jnp.float32)
    pixels = jax.image.resize(pixels, (images.shape[0], image_size, image_size, 3), "bilinear", antialias=True)
    return ((pixels / 255 - mean) / deviation).astype(dtype)


def visible(pixels: np.ndarray, scale: str) -> np.ndarray:
    """Returns what `preprocess` made, `[.., 3]` float, as a person sees it: uint8, scaling taken back."""
    mean, deviation = np.asarray(SCALES[scale], np.float32)
    return np.clip(np.round((pixels * deviation + mean) * 255), 0, 255).astype(np.uint8)


def augment(key: jax.Array, images: jax.Array, kind: str) -> jax.Array:
    """Returns the images, each changed by its own draw; the same key and batch give the same result.

    Args:
        key: a JAX random key.
        images: `[batch, size, size, 3]` float, scaled or not: every result pixel is a weighted mean of pixels.
        kind: `none`; `flip`: left-right, with probability a half; `crop_flip`: flip, and a crop of random area and
            aspect ratio resized back to `size` (random resized crop, Szegedy et al. 2015, arXiv:1409.4842).

    Returns:
        `[batch, size, size, 3]`, the dtype of `images`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("none", "flip", "crop_flip"):
        raise ValueError(f"augment={kind!r} is none of none, flip, crop_flip")
    if kind == "none":
        return images
    batch, size = images.shape[:2]
    flip_key, area_key, ratio_key, top_key, left_key = jax.random.split(key, 5)
    flipped = jax.random.bernoulli(flip_key, shape=(batch,))
    if kind == "flip":
        return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)

    area = jax.random.uniform(area_key, (batch,), minval=_CROP_AREA[0], maxval=_CROP_AREA[1])
    low, high = jnp.log(jnp.asarray(_CROP_RATIO))
    ratio = jnp.exp(jax.random.uniform(ratio_key, (batch,), minval=low, maxval=high))
    # As fractions of the side. A side longer than the image is cut to it: such a crop is narrower than drawn.
    height, width = jnp.minimum(jnp.sqrt(area / ratio), 1), jnp.minimum(jnp.sqrt(area * ratio), 1)
    top = jax.random.uniform(top_key, (batch,)) * (1 - height)
    left = jax.random.uniform(left_key, (batch,)) * (1 - width)

    # A crop of varying size has no static shape; interpolation as two batched matrix products has, and the matrix
    # units do it. A crop is never larger than its result, so that there is nothing to antialias.
    rows = _interpolation(top, height, size)
    columns = _interpolation(left, width, size)
    columns = jnp.where(flipped[:, None, None], columns[:, ::-1], columns)
    # Highest precision: the default of TPUs rounds pixels to bfloat16.
    resized = jnp.einsum(
        "bih,bjw,bhwc->bijc",
        rows,
        columns,
        images.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return resized.astype(images.dtype)


def _interpolation(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Returns bilinear weights `[batch, size (result), size (source)]` float32; each row sums to one.

    Args:
        start, length: `[batch]`, the part of the side that is kept, as fractions of it.
        size: pixels of the side, before and after.
    """
    centres = (jnp.arange(size) + 0.5) / size
    source = (start[:, None] + centres * length[:, None]) * size - 0.5
    source = jnp.clip(source, 0, size - 1)  # beyond the outermost centres the edge pixel goes on
    return jnp.maximum(0, 1 - jnp.abs(source[:, :, None] - jnp.arange(size)))
