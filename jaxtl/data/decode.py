"""From listed examples to pixels: decoded once, into one uint8 array per split."""

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxtl import storage
from jaxtl.data.listing import Listing, Track
from jaxtl.errors import UserError

_MEMORY_LIMIT = 4 << 30  # bytes; more goes to a memory-mapped file
_NAMED = 20  # unreadable images named in the error
_RUN = 64  # examples a thread takes at a time: reading records singly costs as much as decoding a small JPEG


class _SizesDiffer(Exception):
    """An image is not of the size that the first one has."""


def decode(listings: Sequence[Listing], image_size: int, resize: str, show_progress: Track) -> list[np.ndarray]:
    """Returns the pixels of each listing, `[n, height, width, 3]` uint8; see `sources.load`."""
    native = _first_size(listings[0])
    if native and max(native) <= image_size:
        try:
            return _decode_as(native, listings, image_size, resize, show_progress)
        except _SizesDiffer:
            pass
    return _decode_as(None, listings, image_size, resize, show_progress)


def thumbnails(listing: Listing, side: int) -> list[Image.Image]:
    """Returns the images as they are, upright and RGB, those that are larger shrunk to at most `side` pixels a side.

    Raises:
        OSError, ValueError, ..: an image is damaged.
    """

    def shrunk(opener: Callable[[], Image.Image]) -> Image.Image:
        def draft() -> Image.Image:
            image = opener()
            image.draft(None, (side, side))  # of a JPEG, only as much as is needed is decoded
            return image

        image = _rgb(draft)
        image.thumbnail((side, side))
        return image

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(shrunk, listing.read(listing.items)))


def _first_size(listing: Listing) -> tuple[int, int] | None:
    for item in listing.items:
        try:
            return _rgb(listing.read([item])[0]).size
        except Exception:  # reported with the others by _decode_as
            continue
    return None


def _decode_as(
    native: tuple[int, int] | None,
    listings: Sequence[Listing],
    image_size: int,
    resize: str,
    show_progress: Track,
) -> list[np.ndarray]:
    """Returns the pixels, all of the size (width, height) `native`, or resized where that is None."""
    width, height = native or (image_size, image_size)
    if resize == "crop":
        width = height = min(width, height)
    arrays = _allocate([(len(listing.labels), height, width, 3) for listing in listings])

    def square(image: Image.Image) -> Image.Image:
        side, left, top = min(image.size), *((length - min(image.size)) // 2 for length in image.size)
        return image.crop((left, top, left + side, top + side))

    def decode(listing: Listing, array: np.ndarray, run: range) -> list[str | None]:
        """Fills rows of `array`; returns what is wrong with each image, or None."""
        faults = []
        for row, opener in zip(run, listing.read(listing.items[run.start : run.stop]), strict=True):
            try:
                image = _rgb(opener)
            except MemoryError:
                raise
            except Exception as error:  # damaged files make Pillow raise almost anything
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
                faults.append(f"{listing.ids[row]} ({reason})")
                continue
            if native and image.size != native:
                raise _SizesDiffer
            if resize == "crop":
                image = square(image)
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            array[row] = np.asarray(image)
            faults.append(None)
        return faults

    unreadable = []
    for listing, array, split in zip(listings, arrays, ("training", "evaluation"), strict=False):  # or one alone
        count = len(listing.labels)
        runs = [range(start, min(start + _RUN, count)) for start in range(0, count, _RUN)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            done = itertools.chain.from_iterable(threads.map(partial(decode, listing, array), runs))
            unreadable += filter(None, show_progress(done, count, f"decoding {split} images"))
    if unreadable:
        more = f"; {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
        named = "; ".join(unreadable[:_NAMED])
        raise UserError(f"unreadable images ({len(unreadable)}), repair or remove them: {named}{more}")
    return arrays


def _rgb(opener: Callable[[], Image.Image]) -> Image.Image:
    """Returns the image upright (EXIF) and as 8-bit RGB; transparent parts over white."""
    with opener() as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` clips at 255
            return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            over = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
        return image.convert("RGB")


def _allocate(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Returns uint8 arrays of these shapes, in unlinked temporary files if they are large together."""
    if sum(map(math.prod, shapes)) <= _MEMORY_LIMIT:
        return [np.empty(shape, np.uint8) for shape in shapes]
    arrays = []
    try:
        for shape in shapes:
            with tempfile.TemporaryFile(prefix="jaxtl-") as file:
                storage.reserve(file.fileno(), math.prod(shape))
                arrays.append(np.memmap(file, np.uint8, "r+", shape=shape))
    except OSError as error:
        size = sum(map(math.prod, shapes)) / 2**30
        raise UserError(
            f"the decoded images take {size:.1f} GiB in {tempfile.gettempdir()}: {error.strerror}; make room there, "
            "set TMPDIR to a folder with room, or draw fewer images (data.train_size, data.eval_size)"
        ) from None
    return arrays
