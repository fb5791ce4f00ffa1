"""Image classification sets in tensorflow-datasets' format, read without tensorflow."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxtl import config
from jaxtl.data import folder
from jaxtl.data.listing import Listing, Track
from jaxtl.errors import UserError, suggest

_DRAWN = "train"  # of `data.eval_split`: drawn from the training split, whatever that is
LAYOUT = "a tfds data dir is DIR/NAME/VERSION/dataset_info.json or DIR/NAME/CONFIG/VERSION/dataset_info.json"

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


def tensorflow_datasets(data: config.Images, show_progress: Track) -> list[Listing]:
    """Lists the two splits of a set, prepared first where it is not there and that is allowed."""
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

    def listing(field: str, split: str) -> Listing:
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
        return Listing(np.array(labels, np.int32), class_names, ids, range(len(labels)), read)

    def records_of(split: str) -> list[tuple[str, int, int]]:
        """Returns (split on the disk, start, stop) of the parts that it is made of."""
        found = []
        for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits):
            size = builder.info.splits[part.splitname].num_examples
            found.append((part.splitname, part.from_ or 0, size if part.to is None else part.to))
        return found

    def overlaps(split: str) -> bool:
        return any(
            name == other and max(start, first) < min(stop, last)
            for name, start, stop in records_of(data.train_split)
            for other, first, last in records_of(split)
        )

    train = listing("train_split", data.train_split)
    held_out = data.eval_split
    if not held_out:
        usual = [name for name in ("test", "validation") if name in builder.info.splits]
        held_out = next((name for name in usual if not overlaps(name)), _DRAWN)
    if held_out in (_DRAWN, data.train_split):
        return [train]
    found = [train, listing("eval_split", held_out)]
    if overlaps(held_out):
        raise UserError(
            f"data.eval_split={held_out} holds examples of data.train_split={data.train_split}, which the model would "
            f"be judged by: name splits apart, or data.eval_split={_DRAWN} to draw from the training split"
        )
    return found


def prepared_sets(root: Path) -> dict[str, list[Path]]:
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
    prepared = prepared_sets(root)
    base, _, version = name.partition(":")
    names = [other for other in prepared if not base or other == base or other.startswith(f"{base}/")]
    if not base and not names:
        raise UserError(f"data.name is empty and {root} has no data set; {LAYOUT}; {folder.LAYOUT}")
    if len(names) > 1 and base not in names:
        raise UserError(f"data.name={name!r}: choose one of {', '.join(names)}")
    folders = prepared[base if base in names else names[0]] if names else []
    return next((folder for folder in reversed(folders) if version in ("", folder.name)), None)


def _prepare(root: Path, name: str, known: Sequence[str], download: bool, show_progress: Track) -> None:
    """Lets tfds download and prepare `name` in `root`; raises a UserError that says how to do it elsewhere."""
    base = re.split("[/:]", name)[0]
    prepared = prepared_sets(root)
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
        attempt = "nothing is downloaded (--explain, or data.download=false)"
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
