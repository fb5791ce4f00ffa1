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

from jaxtl import hosts, storage
from jaxtl.data.listing import Listing, Track
from jaxtl.errors import UserError

_MEMORY_LIMIT = 4 << 30  # bytes; more goes to a memory-mapped file
_NAMED = 20  # unreadable images named in the error
_RUN = 64  # examples a thread takes at a time: reading records singly costs as much as decoding a small JPEG


class _SizesDiffer(Exception):
    """An image is not of the size that the first one has."""


def decode(
    listings: Sequence[Listing],
    image_size: int,
    resize: str,
    show_progress: Track,
    shape: tuple[int, int] | None = None,
    owners: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Returns the pixels of each listing, `[n, height, width, 3]` uint8; see `sources.load`.

    Args:
        listings: what to decode.
        image_size, resize, show_progress: see `sources.load`.
        shape: height and width that all images get; None: `sources.load` says which.
        owners: the process that decodes each image of each listing; None: all of them here.
    """
    own = list(listings)
    if owners:
        own = [listing.take(np.flatnonzero(of == hosts.index())) for listing, of in zip(listings, owners, strict=True)]

    def decoded(native: tuple[int, int] | None, shape: tuple[int, int]) -> list[np.ndarray] | None:
        """None where sizes differ. Where each process decodes its own, all end alike; else none waits for others."""
        found = fault = None
        try:
            found = _decode_as(native, own, shape, resize, show_progress)
        except _SizesDiffer:
            pass
        except UserError as error:
            fault = error
        whole, alike = not fault, bool(fault or found)
        if owners:
            whole, alike = hosts.all_say([whole, alike])
        if not whole:
            raise fault or UserError("another process cannot decode its images: it says why")
        return found if alike else None

    if shape:
        return decoded(None, shape)
    native = _first_size(listings[0])
    kept = decoded(native, _shape(native, resize)) if native and max(native) <= image_size else None
    return kept or decoded(None, (image_size, image_size))


def fit(image: Image.Image, shape: tuple[int, int], resize: str) -> np.ndarray:
    """Returns the pixels of an 8-bit RGB image, `[height, width, 3]` uint8.

    Args:
        image: see `rgb`.
        shape: height and width of the result.
        resize: `stretch`; or `crop`, which cuts out the square in the middle first.
    """
    if resize == "crop":
        side, left, top = min(image.size), *((length - min(image.size)) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    height, width = shape
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def thumbnails(listing: Listing, side: int) -> list[Image.Image]:
    """Returns the images as they are, upright and RGB, those that are larger shrunk to at most `side` pixels a side.

    Raises:
        UserError: an image is damaged.
    """

    def shrunk(opener: Callable[[], Image.Image]) -> Image.Image:
        def draft() -> Image.Image:
            image = opener()
            image.draft(None, (side, side))  # of a JPEG, only as much as is needed is decoded
            return image

        image = rgb(draft)
        image.thumbnail((side, side))
        return image

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(shrunk, listing.read(listing.items)))


def _first_size(listing: Listing) -> tuple[int, int] | None:
    for item in listing.items:
        try:
            return rgb(listing.read([item])[0]).size
        except UserError:  # reported with the others by _decode_as
            continue
    return None


def _decode_as(
    native: tuple[int, int] | None,
    listings: Sequence[Listing],
    shape: tuple[int, int],
    resize: str,
    show_progress: Track,
) -> list[np.ndarray]:
    """Returns the pixels, fitted to `shape`.

    Raises:
        _SizesDiffer: an image has not the size `native`, (width, height), where one is given.
    """
    arrays = _allocate([(len(listing.labels), *shape, 3) for listing in listings])

    def decode(listing: Listing, array: np.ndarray, run: range) -> list[str | None]:
        """Fills rows of `array`; returns what is wrong with each image, or None."""
        faults = []
        for row, opener in zip(run, listing.read(listing.items[run.start : run.stop]), strict=True):
            try:
                image = rgb(opener)
            except UserError as error:
                faults.append(f"{listing.ids[row]} ({error})")
                continue
            if native and image.size != native:
                raise _SizesDiffer
            array[row] = fit(image, shape, resize)
            faults.append(None)
        return faults

    unreadable = []
    splits = ("training ", "evaluation ") if len(listings) > 1 else ("",)
    for listing, array, split in zip(listings, arrays, splits, strict=True):
        count = len(listing.labels)
        runs = [range(start, min(start + _RUN, count)) for start in range(0, count, _RUN)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            done = itertools.chain.from_iterable(threads.map(partial(decode, listing, array), runs))
            unreadable += filter(None, show_progress(done, count, f"decoding {split}images"))
    if unreadable:
        more = f"; {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
        named = "; ".join(unreadable[:_NAMED])
        raise UserError(f"unreadable images ({len(unreadable)}), repair or remove them: {named}{more}")
    return arrays


def rgb(opener: Callable[[], Image.Image]) -> Image.Image:
    """Returns the image upright (EXIF) and as 8-bit RGB; transparent parts over white.

    Raises:
        UserError: it cannot be opened or decoded; says why, in few words.
    """
    try:
        with opener() as image:
            return _upright(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        if isinstance(error, UnidentifiedImageError):
            raise UserError("not an image") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(" ".join(reason.split())) from None


def _upright(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` clips at 255
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _shape(native: tuple[int, int], resize: str) -> tuple[int, int]:
    """Returns height and width of images that keep their size (width, height), or the square in its middle."""
    width, height = native
    return (min(native),) * 2 if resize == "crop" else (height, width)


def _allocate(shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Returns uint8 arrays of these shapes, in unlinked temporary files if they are large together."""
    if sum(map(math.prod, shapes)) <= _MEMORY_LIMIT:
        return [np.empty(shape, np.uint8) for shape in shapes]
    arrays = []
    try:
        for shape in shapes:
            if not math.prod(shape):  # of several processes, one may have nothing of a small split
                arrays.append(np.empty(shape, np.uint8))
                continue
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
