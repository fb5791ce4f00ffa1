"""Data sets, drawn and made into arrays: tfds, image folders, the digits of scikit-learn, text files.

A source lists its examples without decoding or tokenising them. `listings` draws the stratified subset from the list;
`read` decodes what was drawn, `tokenised` cuts it into word pieces.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import sklearn.datasets
from PIL import Image
from sklearn.model_selection import train_test_split

from jaxtl import config, storage
from jaxtl.data import folder, text, tfds, tokens
from jaxtl.data.decode import decode
from jaxtl.data.listing import Examples, Listing, Texts, Track, no_progress
from jaxtl.errors import UserError, suggest

Split = TypeVar("Split", Listing, Texts)


def load(data: config.Images, image_size: int, show_progress: Track = no_progress) -> list[Examples]:
    """Returns the training and the evaluation images.

    If all images, of both splits, have one size no larger than `image_size` they keep it, and the compiled step
    resizes them (`resize="crop"` cuts them to the square in the middle). Otherwise all are resized here to
    `image_size`, bilinear and antialiased.

    Args:
        data: what to load.
        image_size: side of the square images the model takes, in pixels.
        show_progress: wraps the slow loops.

    Raises:
        UserError: whatever is wrong with the data or its description; all unreadable images in one message.
    """
    return read(listings(data, show_progress), data.resize, image_size, show_progress)


def read(
    drawn: Sequence[Listing],
    resize: str,
    image_size: int,
    show_progress: Track = no_progress,
    shape: tuple[int, int] | None = None,
    owners: Sequence[np.ndarray] | None = None,
) -> list[Examples]:
    """Returns the images that `listings` drew; see `load`.

    Args:
        drawn, resize, image_size, show_progress: see `load`.
        shape: height and width that all of them get; None: as `load` says.
        owners: of several processes, for each listing, see `Examples`: every process decodes its own images.
    """
    pixels = decode(drawn, image_size, resize, show_progress, shape, owners)
    return [
        Examples(images, listing.labels, listing.class_names, tuple(listing.ids), owners=own)
        for images, listing, own in zip(pixels, drawn, owners or [None] * len(drawn), strict=True)
    ]


def tokenised(
    drawn: Sequence[Texts], tokenizer: Any, max_length: int, show_progress: Track = no_progress
) -> list[Examples]:
    """Returns the texts that `listings` drew, as word pieces; what was tokenised before is read from the cache."""
    folder = storage.cache_folder() / "tokens"
    return [
        Examples(
            tokens.tokenise(split.texts, tokenizer, max_length, show_progress, folder),
            split.labels,
            split.class_names,
            tuple(split.ids),
            tuple(split.texts),
        )
        for split in drawn
    ]


def listings(data: config.Data, show_progress: Track = no_progress) -> list[Listing] | list[Texts]:
    """Returns the training and the held-out examples, and those for the test where there are such: drawn only.

    Raises:
        UserError: whatever is wrong with the data or its description.
    """
    if isinstance(data, config.Text):
        splits = text.splits(data)
        found, held_back = [splits[name] for name in ("train", "validation") if name in splits], splits.get("test")
    else:
        found, held_back = [_keep_classes(listing, data.classes) for listing in _images(data, show_progress)], None
    if len(found) == 1:
        (listing,) = found
        size = max(round(data.eval_fraction * len(listing.labels)), len(listing.class_names))
        held_out, rest = _draw(listing, size, data.subset_seed, f"data.eval_fraction={data.eval_fraction}")
        found = [listing.take(rest), listing.take(held_out)]
    drawn = [
        _subset(listing, getattr(data, field), data.subset_seed, field)
        for listing, field in zip(found, ("train_size", "eval_size"), strict=True)
    ]
    return drawn if held_back is None else [*drawn, held_back]


def _images(data: config.Images, show_progress: Track) -> list[Listing]:
    try:
        source = _detect(data) if data.source == "auto" else data.source
        return _SOURCES[source](data, show_progress)
    except OSError as error:
        raise UserError(f"{error.filename or data.dir} cannot be read: {error.strerror or error}") from None


def _keep_classes(listing: Listing, names: Sequence[str]) -> Listing:
    """Returns the examples of the classes named, numbered in the order of `names`; all when there are none."""
    if not names:
        return listing
    for name in names:
        if name not in listing.class_names:
            raise UserError(
                f"data.classes: there is no class {name!r}{suggest(name, listing.class_names)}; "
                f"there are {', '.join(listing.class_names)}"
            )
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError(f"data.classes={','.join(names)}: name at least two classes, each once")
    number = np.full(len(listing.class_names), -1, np.int32)
    number[[listing.class_names.index(name) for name in names]] = np.arange(len(names))
    labels = number[listing.labels]
    kept = dataclasses.replace(listing, labels=labels, class_names=tuple(names))
    return kept.take(np.flatnonzero(labels >= 0))


def _subset(listing: Split, size: int | None, seed: int, field: str) -> Split:
    available = len(listing.labels)
    if size is None or size == available:
        if not available:
            raise UserError(f"no example is left for data.{field}: data.classes names none that the split has")
        return listing
    if size > available:
        raise UserError(f"data.{field}={size}: there are {available} examples; set it to that or less, or to none")
    drawn, _ = _draw(listing, size, seed, f"data.{field}={size}")
    return listing.take(drawn)


def _draw(listing: Listing | Texts, size: int, seed: int, setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `size` row numbers drawn stratified by class, and the others; both ascending."""
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    present, total = np.count_nonzero(counts), len(listing.labels)
    if not present <= size <= total - present:
        raise UserError(
            f"{setting} would draw {size} of {total} examples; a draw stratified by {present} classes takes at least "
            f"{present} and leaves at least {present}, or takes all"
            + (": is data.label_column the column of the labels?" if present == total > 1 else "")
        )
    if (alone := np.flatnonzero(counts == 1)).size:
        names = ", ".join(listing.class_names[label] for label in alone)
        raise UserError(f"{setting}: a stratified draw needs two examples a class, and there is one of {names}")
    drawn, rest = train_test_split(
        np.arange(total), train_size=size, random_state=seed % 2**32, stratify=listing.labels
    )
    return np.sort(drawn), np.sort(rest)


def _detect(data: config.Images) -> str:
    """Returns the source that `data.dir` holds."""
    if not data.dir:
        return "tfds"
    root = Path(data.dir).expanduser()
    if tfds.prepared_sets(root):
        return "tfds"
    if folder.holds_images(root):
        return "folder"
    if next(root.glob("**/dataset_info.json"), None) or (root / "dataset_info.json").is_file():
        raise UserError(f"data.dir={data.dir} lies inside a tfds data dir: {tfds.LAYOUT}; give DIR")
    missing = "has neither layout" if root.is_dir() else "is not a folder"
    raise UserError(
        f"data.dir={data.dir} {missing}: {tfds.LAYOUT} (set data.source=tfds to have one prepared there); "
        f"{folder.LAYOUT}"
    )


def _digits(data: config.Images, show_progress: Track) -> list[Listing]:
    digits = sklearn.datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # ink from 0 to 16
    ids = [f"digits:{i}" for i in range(len(pixels))]
    labels = digits.target.astype(np.int32)
    names = tuple(map(str, range(10)))
    return [Listing(labels, names, ids, pixels, lambda run: [partial(Image.fromarray, item) for item in run])]


_SOURCES = {"tfds": tfds.tensorflow_datasets, "folder": folder.image_folder, "digits": _digits}
