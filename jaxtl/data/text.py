"""Texts for training: of the files that `config.Text` describes, the training, validation and test texts.

Only files that the user named are opened; `jaxtl.data.records` reads them.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from jaxtl import config
from jaxtl.data import published, records
from jaxtl.data.listing import Texts
from jaxtl.errors import UserError, suggest
from jaxtl.progress import say, say_once


def splits(data: config.Text) -> dict[str, Texts]:
    """Returns the texts of `train`, and of `validation` and `test` where there is a file for it.

    Labels are `[n]` int32, positions in `class_names`, the same for all splits; without a label column all 0, and no
    names. Ids are `FILE:RECORD`, see `records.read`.

    Raises:
        UserError: whatever is wrong with the files or their description.
    """
    if data.classes and not data.label_column:
        raise UserError("data.classes chooses among labels, and data.label_column names no column of them")
    if data.classes and (len(set(data.classes)) != len(data.classes) or len(data.classes) < 2):
        raise UserError(f"data.classes={','.join(data.classes)}: name at least two classes, each once")
    found: dict[str, Texts] = {}
    names: tuple[str, ...] | None = None
    for split, paths in _files(data).items():
        found[split] = read(paths, data, names)
        names = found[split].class_names
    return found


def read(paths: Sequence[Path], data: config.Text, class_names: Sequence[str] | None = None) -> Texts:
    """Returns the texts of some files, taken together.

    Args:
        paths: the files.
        data: which columns and classes are wanted.
        class_names: the classes that there are; None: those of `data.classes`, or that are found.

    Raises:
        UserError: whatever is wrong with the files, and a label that is none of `class_names`.
    """
    ids, texts, labels = _read(paths, data)
    names = tuple(class_names or (_class_names(labels, data) if data.label_column else ()))
    number = {name: i for i, name in enumerate(names)} or {"": 0}
    rows = [row for row, label in enumerate(labels) if label in number]
    where = ", ".join(map(str, paths))
    if len(rows) < len(labels) and not data.classes:
        row = next(row for row, label in enumerate(labels) if label not in number)
        raise UserError(
            f"{ids[row]} has the label {labels[row]!r}, which no training text has{suggest(labels[row], names)}; "
            f"there are {records.shown(names)}"
        )
    if not rows:
        raise UserError(f"{where}: {'no record has a label of data.classes' if labels else 'there are no records'}")
    if empty := [ids[row] for row in rows if not texts[row].strip()]:
        raise UserError(f"no text in {records.shown(empty, 5)}, {len(empty)} of {len(labels)} records: remove them")
    numbers = np.array([number[labels[row]] for row in rows], np.int32)
    if names and len(np.unique(numbers)) < 2:
        say(f"{where}: all labels are {labels[rows[0]]!r}; ROC-AUC is not defined there")
    return Texts(numbers, names, tuple(ids[row] for row in rows), tuple(texts[row] for row in rows))


# --- which files -----------------------------------------------------------------------------------------


def _files(data: config.Text) -> dict[str, list[Path]]:
    """Returns the paths of each split that has any; all of them exist."""
    named = {"train": data.train, "validation": (data.validation,), "test": (data.test,)}
    entry = published.find(data.name) if data.name else None
    if entry and not data.train:
        named = {split: names if any(names) else (getattr(entry, split).name,) for split, names in named.items()}
    if not any(named["train"]):
        raise UserError(
            "there are no training texts: --set data.train=tweets.csv --set data.text_column=.. --set "
            f"data.label_column=.., or --set data.name= one of {', '.join(published.SETS)}"
        )
    folder = Path(os.path.expanduser(data.dir))
    if data.name and not data.dir:
        known = (entry.train.name, entry.validation.name, entry.test.name)
        for name in (*named["train"], *named["validation"], *named["test"]):
            if name and name not in known and not Path(os.path.expanduser(name)).is_absolute():
                raise UserError(
                    f"{name} is no file of {data.name}, which has {', '.join(known)}; for files of your own add "
                    "--set data.name= (empty)"
                )
        folder = published.fetch(data.name, data.download)
    files: dict[str, list[Path]] = {}
    for split, names in named.items():
        paths = [folder / os.path.expanduser(name) for name in names if name]
        missing = next((path for path in paths if not os.path.isfile(path)), None)
        if missing and split == "test" and entry and not (data.train or data.test):
            say_once(
                f"NO TEST TEXTS: there is no {missing}, so all figures will be those of the validation "
                f"texts; the file is at {entry.address}"
            )
        elif missing:
            raise UserError(f"data.{split}: {_explain_missing(missing)}")
        elif paths:
            files[split] = paths
    train = [path.resolve() for path in files["train"]]
    if len(set(train)) < len(train):
        raise UserError(f"data.train={','.join(data.train)} names a file twice")
    if "test" in files and files["test"][0].resolve() in [path.resolve() for path in files.get("validation", ())]:
        say(f"data.test: the model is selected on {files['test'][0]} too: the figures of the test are no test")
    for split in ("validation", "test"):
        if any(path.resolve() in train for path in files.get(split, ())):
            raise UserError(f"data.{split}: {files[split][0]} holds the training texts; leave it empty or name another")
    return files


def _explain_missing(path: Path) -> str:
    if os.path.isdir(path):
        return f"{path} is a folder; name the file in it"
    if not os.path.isdir(path.parent):
        return f"there is no {path}: {path.parent} is not a folder"
    held: list[str] = []
    with suppress(OSError):  # a folder that may be entered, but not listed
        held = sorted(name for name in os.listdir(path.parent) if Path(name).suffix.lower() in records.READERS)
    return f"there is no {path}{suggest(path.name, held)}; the folder holds {records.shown(held) or 'no texts'}"


# --- what is in them -------------------------------------------------------------------------------------


def _read(paths: Sequence[Path], data: config.Text) -> tuple[list[str], list[str], list[str]]:
    """Returns ids, texts and labels of all records; every one has a label where there is a column of them."""
    ids: list[str] = []
    texts: list[str] = []
    labels: list[str] = []
    names = [path.name for path in paths]
    kept: dict[str, str] = {}  # one string for each label, not one for each record
    for path in paths:
        name = path.name if names.count(path.name) == 1 else str(path)
        for number, text, label in records.read(path, data.text_column, data.label_column):
            ids.append(f"{name}:{number}")
            texts.append(text)
            labels.append(kept.setdefault(label, label))
    if data.label_column and "" in kept:
        empty = [name for name, label in zip(ids, labels, strict=True) if not label]
        where = f"{records.shown(empty, 5)}, {len(empty)} of {len(ids)} records"
        raise UserError(f"no {data.label_column!r} in {where}: fill it in, or remove them")
    return ids, texts, labels


def _class_names(labels: Sequence[str], data: config.Text) -> tuple[str, ...]:
    present = sorted(set(labels))
    for name in data.classes:
        if name not in present:
            raise UserError(
                f"data.classes: no training text has the label {name!r}{suggest(name, present)}; "
                f"there are {records.shown(present)}"
            )
    if len(present) == 1:
        raise UserError(
            f"all training texts have the label {present[0]!r}, and a classifier needs two: is "
            f"data.label_column={data.label_column} the right column?"
        )
    return data.classes or tuple(present)
