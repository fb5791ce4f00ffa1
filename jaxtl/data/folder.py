"""Image folders: one folder a class."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from jaxtl import config
from jaxtl.data.listing import Listing, Track
from jaxtl.errors import UserError
from jaxtl.progress import say

_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing")
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAYOUT = (
    "an image folder is DIR/train/CLASS/IMAGE beside DIR/val/CLASS/IMAGE (or validation, or test), or "
    f"DIR/CLASS/IMAGE, two classes or more; images end in {', '.join(EXTENSIONS)}"
)


def holds_images(root: Path) -> bool:
    """Whether a folder of `root` holds an image."""
    return root.is_dir() and any(next(_images(folder, root), None) for folder in _folders(root))


def image_folder(data: config.Images, show_progress: Track) -> list[Listing]:
    """Lists the splits of an image folder, without opening an image: one listing where it is not divided."""
    del show_progress  # listing files takes no time
    root = Path(data.dir).expanduser().resolve()
    if not data.dir or not root.is_dir():
        raise UserError(f"data.dir={data.dir!r} is not a folder: {LAYOUT}")
    folders = {folder.name.lower(): folder for folder in _folders(root)}
    train = next((name for name in _TRAIN if name in folders and _folders(folders[name])), None)
    splits = [folders[train], *_held_out(data.eval_split.lower(), train, folders, root)] if train else [root]
    found = [{folder.name: list(_images(folder, root)) for folder in _folders(split)} for split in splits]
    names = tuple(sorted(found[0]))
    if empty := [name for name in names if not found[0][name]]:
        raise UserError(f"{splits[0]}: no images in {', '.join(empty)}; {LAYOUT}")
    if len(names) < 2 or (splits == [root] and set(folders) <= {*_TRAIN, *_HELD_OUT}):
        raise UserError(f"{splits[0]} holds {', '.join(names) or 'no folders'}: {LAYOUT}")
    if unknown := sorted(set(found[-1]) - set(names)):
        raise UserError(f"{splits[-1]} has classes that {splits[0]} has not: {', '.join(unknown)}")

    if others := left_out(splits):
        say(f"left out of {root}, not being images that are read: {others}")
    listings = []
    for split, classes in zip(splits, found, strict=True):
        pairs = [(path, label) for label, name in enumerate(names) for path in classes.get(name, ())]
        if not pairs:
            raise UserError(f"{split} holds no images: {LAYOUT}")
        paths = [path for path, _ in pairs]
        labels = np.array([label for _, label in pairs], np.int32)
        ids = [path.relative_to(root).as_posix() for path in paths]
        listings.append(Listing(labels, names, ids, paths, lambda run: [partial(Image.open, path) for path in run]))
    return listings


def left_out(folders: Iterable[Path]) -> str:
    """Returns how many files below folders have the suffix of no image, in words; '' where all have."""
    counts = Counter(
        path.suffix.lower() or path.name
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() not in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(10))


def _held_out(chosen: str, train: str, folders: dict[str, Path], root: Path) -> list[Path]:
    """Returns the folder of the held-out split; none where it is to be drawn from the training split."""
    if chosen in (*_TRAIN, train):
        return []
    others = sorted(set(folders) - {train})
    name = chosen or next((name for name in _HELD_OUT if name in folders), None)
    if name in folders:
        return [folders[name]]
    if others:
        raise UserError(
            f"{root} holds {train} beside {', '.join(others)}: name the held-out split with data.eval_split "
            "(train: draw it from the training images)"
        )
    if chosen:
        raise UserError(f"data.eval_split={chosen}: there is no such folder in {root}")
    return []


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _images(folder: Path, root: Path) -> Iterator[Path]:
    """Yields the image files below `folder`, sorted; a symbolic link out of `root` is an error."""
    for path in _entries(folder):
        if path.is_dir():
            yield from _images(path, root)
        elif path.suffix.lower() in EXTENSIONS:
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root.resolve()):
                raise UserError(f"{path} is a symbolic link out of {root}; put the image itself there")
            yield path


def _entries(folder: Path) -> Iterator[Path]:
    """Yields what lies in `folder`, sorted, not hidden; a symbolic link to a folder is an error."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and path.is_dir():
            raise UserError(f"{path} is a symbolic link to a folder; links are not followed, move the folder there")
        yield path
