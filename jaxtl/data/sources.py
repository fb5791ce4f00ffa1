"""Image data sets, drawn and decoded: tfds, image folders, the digits of scikit-learn.

A source lists its examples without decoding them. `load` draws the stratified subset from the list, then decodes
what was drawn, once, into one uint8 array per split.
"""

import dataclasses
import io
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.model_selection import train_test_split

from jaxtl import config
from jaxtl.errors import UserError, suggest

# (iterable, total, description) -> the same items; draws a progress bar on the way.
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One split, decoded.

    Attributes:
        images: `[n, height, width, 3]` uint8, in memory or memory-mapped.
        labels: `[n]` int32, positions in `class_names`.
        class_names: names of the classes; the same for both splits.
        ids: a name for each example: the file's path relative to the folder, or `split:index`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Examples not decoded yet: `read` fetches a run of `items` and returns a function for each, which opens it."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: Sequence[str]
    items: Sequence[Any]
    read: Callable[[Sequence[Any]], list[Callable[[], Image.Image]]]

    def take(self, rows: np.ndarray) -> "_Listing":
        return dataclasses.replace(
            self,
            labels=self.labels[rows],
            ids=tuple(self.ids[row] for row in rows),
            items=[self.items[row] for row in rows],
        )


def no_progress(iterable: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """The `Track` that shows nothing."""
    return iterable


def load(data: config.Data, image_size: int, show_progress: Track = no_progress) -> tuple[ImageSet, ImageSet]:
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
    try:
        source = _detect(data) if data.source == "auto" else data.source
        listings = _SOURCES[source](data, show_progress)
    except OSError as error:
        raise UserError(f"{error.filename or data.dir} cannot be read: {error.strerror or error}") from None
    listings = [_keep_classes(listing, data.classes) for listing in listings]
    if len(listings) == 1:
        (listing,) = listings
        size = max(round(data.eval_fraction * len(listing.labels)), len(listing.class_names))
        held_out, rest = _draw(listing, size, data.subset_seed, f"data.eval_fraction={data.eval_fraction}")
        listings = [listing.take(rest), listing.take(held_out)]
    listings = [
        _subset(listing, getattr(data, field), data.subset_seed, field)
        for listing, field in zip(listings, ("train_size", "eval_size"), strict=True)
    ]
    pixels = _decode(listings, image_size, data.resize, show_progress)
    train, evaluation = (
        ImageSet(images, listing.labels, listing.class_names, tuple(listing.ids))
        for images, listing in zip(pixels, listings, strict=True)
    )
    return train, evaluation


# --- which examples --------------------------------------------------------------------------------------


def _keep_classes(listing: _Listing, names: Sequence[str]) -> _Listing:
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


def _subset(listing: _Listing, size: int | None, seed: int, field: str) -> _Listing:
    available = len(listing.labels)
    if size is None or size == available:
        if not available:
            raise UserError(f"no example is left for data.{field}: data.classes names none that the split has")
        return listing
    if size > available:
        raise UserError(f"data.{field}={size}: there are {available} examples; set it to that or less, or to none")
    drawn, _ = _draw(listing, size, seed, f"data.{field}={size}")
    return listing.take(drawn)


def _draw(listing: _Listing, size: int, seed: int, setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `size` row numbers drawn stratified by class, and the others; both ascending."""
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    present, total = np.count_nonzero(counts), len(listing.labels)
    if not present <= size <= total - present:
        raise UserError(
            f"{setting} would draw {size} of {total} examples; a draw stratified by {present} classes takes at least "
            f"{present} and leaves at least {present}, or takes all"
        )
    if (alone := np.flatnonzero(counts == 1)).size:
        names = ", ".join(listing.class_names[label] for label in alone)
        raise UserError(f"{setting}: a stratified draw needs two examples a class, and there is one of {names}")
    drawn, rest = train_test_split(
        np.arange(total), train_size=size, random_state=seed % 2**32, stratify=listing.labels
    )
    return np.sort(drawn), np.sort(rest)


# --- sources ---------------------------------------------------------------------------------------------

_HELD_OUT = ("val", "validation", "test")
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FOLDER_LAYOUT = (
    "an image folder is DIR/train/CLASS/IMAGE beside DIR/val/CLASS/IMAGE (or validation, or test), or "
    f"DIR/CLASS/IMAGE, two classes or more; images end in {', '.join(_EXTENSIONS)}"
)
_TFDS_LAYOUT = "a tfds data dir is DIR/NAME/VERSION/dataset_info.json or DIR/NAME/CONFIG/VERSION/dataset_info.json"


def _detect(data: config.Data) -> str:
    """Returns the source that `data.dir` holds."""
    if not data.dir:
        return "tfds"
    root = Path(data.dir).expanduser()
    if _prepared(root):
        return "tfds"
    if root.is_dir() and any(next(_images(folder, root), None) for folder in _folders(root)):
        return "folder"
    missing = "has neither layout" if root.is_dir() else "is not a folder"
    raise UserError(
        f"data.dir={data.dir} {missing}: {_TFDS_LAYOUT} (set data.source=tfds to have one prepared there); "
        f"{_FOLDER_LAYOUT}"
    )


def _digits(data: config.Data, show_progress: Track) -> list[_Listing]:
    digits = sklearn.datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # ink from 0 to 16
    ids = [f"digits:{i}" for i in range(len(pixels))]
    labels = digits.target.astype(np.int32)
    names = tuple(map(str, range(10)))
    return [_Listing(labels, names, ids, pixels, lambda run: [partial(Image.fromarray, item) for item in run])]


def _image_folder(data: config.Data, show_progress: Track) -> list[_Listing]:
    root = Path(data.dir).expanduser().resolve()
    if not data.dir or not root.is_dir():
        raise UserError(f"data.dir={data.dir!r} is not a folder: {_FOLDER_LAYOUT}")
    folders = {folder.name.lower(): folder for folder in _folders(root)}
    held_out = [name for name in (data.eval_split, *_HELD_OUT) if name in folders]
    if "train" in folders and _folders(folders["train"]):
        splits = [folders["train"], *(folders[name] for name in held_out[:1])]
    else:
        splits = [root]
    found = [{folder.name: list(_images(folder, root)) for folder in _folders(split)} for split in splits]
    names = tuple(sorted(found[0]))
    if empty := [name for name in names if not found[0][name]]:
        raise UserError(f"{splits[0]}: no images in {', '.join(empty)}; {_FOLDER_LAYOUT}")
    if len(names) < 2 or (splits == [root] and set(folders) <= set(_HELD_OUT)):
        raise UserError(f"{splits[0]} holds {', '.join(names) or 'no folders'}: {_FOLDER_LAYOUT}")
    if unknown := sorted(set(found[-1]) - set(names)):
        raise UserError(f"{splits[-1]} has classes that {splits[0]} has not: {', '.join(unknown)}")

    listings = []
    for split, classes in zip(splits, found, strict=True):
        pairs = [(path, label) for label, name in enumerate(names) for path in classes.get(name, ())]
        if not pairs:
            raise UserError(f"{split} holds no images: {_FOLDER_LAYOUT}")
        paths = [path for path, _ in pairs]
        labels = np.array([label for _, label in pairs], np.int32)
        ids = [path.relative_to(root).as_posix() for path in paths]
        listings.append(_Listing(labels, names, ids, paths, lambda run: [partial(Image.open, path) for path in run]))
    return listings


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _images(folder: Path, root: Path) -> Iterator[Path]:
    """Yields the image files below `folder`, sorted; a symbolic link out of `root` is an error."""
    for path in _entries(folder):
        if path.is_dir():
            yield from _images(path, root)
        elif path.suffix.lower() in _EXTENSIONS:
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


# tfds prepares data sets with tensorflow, which jaxtl never imports: it would take the accelerator's memory. So it is
# done by another process, which sees no GPU. tfds 4.9.10 tries an unreachable host for over three minutes; five
# attempts end within half a minute.
_PREPARE = """
import sys
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
downloader.MAX_RETRIES = 5
tfds.builder(sys.argv[1], data_dir=sys.argv[2]).download_and_prepare(file_format="array_record")
"""


def _tfds(data: config.Data, show_progress: Track) -> list[_Listing]:
    import tensorflow_datasets as tfds  # takes half a second
    from tensorflow_datasets.proto import tf_example_pb2

    root = Path(data.dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    folder = _find_prepared(root, data.name)
    if folder is None:
        known = tfds.list_builders(with_community_datasets=False)
        _prepare(root, data.name, known, data.download, show_progress)
        folder = _find_prepared(root, data.name)
    try:
        builder = tfds.builder_from_directory(folder)
        image_key, label_key = _image_and_label(tfds, builder.info)
        class_names = tuple(builder.info.features[label_key].names)
    except UserError:
        raise
    except Exception as error:  # of protobuf, of JSON, of tfds
        raise UserError(f"{folder} cannot be read as a tfds data set: {_one_line(error)}") from None

    def example(record: bytes) -> Any:
        return tf_example_pb2.Example.FromString(record).features.feature

    def listing(field: str) -> _Listing:
        split = getattr(data, field)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES  # six times as fast as decoding all but the image
        try:
            records = builder.as_data_source(split, deserialize_method=raw)
        except NotImplementedError:
            raise UserError(
                f"{folder} is stored as {builder.info.file_format.value}, which only tensorflow reads; convert it "
                f"where tensorflow is installed: tfds convert_format --dataset_version_dir={folder} "
                "--out_file_format=array_record"
            ) from None
        except (ValueError, KeyError):
            splits = ", ".join(builder.info.splits)
            raise UserError(f"data.{field}={split}: the splits of {data.name or folder} are {splits}") from None
        starts = range(0, len(records), 1000)
        labels = []
        try:
            for start in show_progress(starts, len(starts), f"reading labels of {split}"):
                rows = range(start, min(start + 1000, len(records)))
                for record in records.__getitems__(list(rows)):
                    labels += example(record)[label_key].int64_list.value[:1] or [-1]
        except Exception as error:  # array_record raises RuntimeError or IndexError, protobuf its own
            raise UserError(
                f"{folder}, split {split}, is damaged ({_one_line(error)}); prepare or copy it again"
            ) from None
        if -1 in labels:
            raise UserError(f"data.{field}={split}: the examples of this split have no labels")

        def open_image(record: bytes) -> Image.Image:
            return Image.open(io.BytesIO(example(record)[image_key].bytes_list.value[0]))

        def read(run: Sequence[int]) -> list[Callable[[], Image.Image]]:
            return [partial(open_image, record) for record in records.__getitems__(list(run))]

        ids = [f"{split}:{row}" for row in range(len(labels))]
        return _Listing(np.array(labels, np.int32), class_names, ids, range(len(labels)), read)

    only_one = list(builder.info.splits) == [data.train_split] and data.eval_split == config.Data.eval_split
    if only_one or data.eval_split == data.train_split:
        return [listing("train_split")]
    return [listing("train_split"), listing("eval_split")]


def _prepared(root: Path) -> dict[str, list[Path]]:
    """Returns name -> folders of the versions, ascending, for the data sets that tfds prepared in `root`."""
    found = {}
    for levels in ("*", "*/*"):
        for info in root.glob(f"{levels}/[0-9]*.[0-9]*.[0-9]*/dataset_info.json"):
            if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
                found.setdefault(info.parent.parent.relative_to(root).as_posix(), []).append(info.parent)
    return {
        name: sorted(found[name], key=lambda folder: tuple(map(int, folder.name.split(".")))) for name in sorted(found)
    }


def _find_prepared(root: Path, name: str) -> Path | None:
    """Returns the folder of `NAME`, `NAME/CONFIG`, `NAME:VERSION`, or '' if there is only one; None if not there."""
    prepared = _prepared(root)
    base, _, version = name.partition(":")
    names = [other for other in prepared if not base or other == base or other.startswith(f"{base}/")]
    if not base and not names:
        raise UserError(f"data.name is empty and {root} has no data set; {_TFDS_LAYOUT}; {_FOLDER_LAYOUT}")
    if len(names) > 1 and base not in names:
        raise UserError(f"data.name={name!r}: choose one of {', '.join(names)}")
    folders = prepared[base if base in names else names[0]] if names else []
    return next((folder for folder in reversed(folders) if version in ("", folder.name)), None)


def _prepare(root: Path, name: str, known: Sequence[str], download: bool, show_progress: Track) -> None:
    """Lets tfds download and prepare `name` in `root`; raises a UserError that says how to do it elsewhere."""
    base = re.split("[/:]", name)[0]
    prepared = _prepared(root)
    there = f"in {root} there are {', '.join(prepared)}" if prepared else f"there are none in {root}"
    if base not in known and base not in prepared:
        raise UserError(
            f"data.name={name}: no such tfds data set{suggest(base, prepared) or suggest(base, known)}; {there}"
        )
    if download:
        for _ in show_progress((None,), 1, f"downloading and preparing {name}"):
            result = subprocess.run(
                [sys.executable, "-c", _PREPARE, name, str(root)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
            )
        if result.returncode == 0:
            return
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        attempt = f"preparing it here failed ({_one_line(reason)})"
    else:
        attempt = "data.download is off"
    raise UserError(
        f"data.name={name} is not prepared in {root / base}, and {attempt}. Where there is a network: pip install "
        f"tensorflow tensorflow-datasets importlib_resources; tfds build {name} --file_format=array_record "
        f"--data_dir=DIR; then copy DIR/{base} to {root / base}, or set data.dir (--set data.dir=DIR)"
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _image_and_label(tfds: Any, info: Any) -> tuple[str, str]:
    """Returns the keys of the image and of the label: the supervised ones, else the only ones of their types."""

    def is_image(feature: Any) -> bool:
        return isinstance(feature, tfds.features.Image) and np.dtype(feature.np_dtype).kind == "u"

    def is_label(feature: Any) -> bool:
        return isinstance(feature, tfds.features.ClassLabel) and bool(feature.num_classes)

    keys = info.supervised_keys or ()
    if len(keys) == 2 and all(isinstance(key, str) and key in info.features for key in keys):
        image, label = keys
        if is_image(info.features[image]) and is_label(info.features[label]):
            return image, label
    images = [key for key, feature in info.features.items() if is_image(feature)]
    labels = [key for key, feature in info.features.items() if is_label(feature)]
    if len(images) != 1 or len(labels) != 1:
        features = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in info.features.items())
        raise UserError(f"{info.full_name} has not one image and one class label, but {features}")
    return images[0], labels[0]


_SOURCES = {"tfds": _tfds, "folder": _image_folder, "digits": _digits}

# --- pixels ----------------------------------------------------------------------------------------------

_MEMORY_LIMIT = 4 << 30  # bytes; more goes to a memory-mapped file
_NAMED = 20  # unreadable images named in the error
_RUN = 64  # examples a thread takes at a time: reading records singly costs as much as decoding a small JPEG


class _SizesDiffer(Exception):
    """An image is not of the size that the first one has."""


def _decode(listings: Sequence[_Listing], image_size: int, resize: str, show_progress: Track) -> list[np.ndarray]:
    """Returns the pixels of each listing, `[n, height, width, 3]` uint8; see `load`."""
    native = _first_size(listings[0])
    if native and max(native) <= image_size:
        try:
            return _decode_as(native, listings, image_size, resize, show_progress)
        except _SizesDiffer:
            pass
    return _decode_as(None, listings, image_size, resize, show_progress)


def _first_size(listing: _Listing) -> tuple[int, int] | None:
    for item in listing.items:
        try:
            return _rgb(listing.read([item])[0]).size
        except Exception:  # reported with the others by _decode_as
            continue
    return None


def _decode_as(
    native: tuple[int, int] | None,
    listings: Sequence[_Listing],
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

    def decode(listing: _Listing, array: np.ndarray, run: range) -> list[str | None]:
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
    for listing, array, split in zip(listings, arrays, ("training", "evaluation"), strict=True):
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
    # Without the space reserved, a full disk would end the process with SIGBUS. macOS cannot reserve it.
    reserve = getattr(os, "posix_fallocate", lambda file, offset, size: os.ftruncate(file, size))
    arrays = []
    try:
        for shape in shapes:
            with tempfile.TemporaryFile(prefix="jaxtl-") as file:
                reserve(file.fileno(), 0, math.prod(shape))
                arrays.append(np.memmap(file, np.uint8, "r+", shape=shape))
    except OSError as error:
        size = sum(map(math.prod, shapes)) / 2**30
        raise UserError(
            f"the decoded images take {size:.1f} GiB in {tempfile.gettempdir()}: {error.strerror}; make room there, "
            "set TMPDIR to a folder with room, or draw fewer images (data.train_size, data.eval_size)"
        ) from None
    return arrays
