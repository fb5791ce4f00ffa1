"""Text files: CSV, TSV, JSON lines, Parquet, or a text on each line.

`records` reads any of them, one record after the other, without keeping them. `splits` makes of them the training,
validation and test texts that `config.Text` describes. Only files that the user named are opened.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from jaxtl import config
from jaxtl.data import published
from jaxtl.data.listing import Texts
from jaxtl.errors import UserError, suggest
from jaxtl.progress import say, say_once

_Rows = Iterator[tuple[int, list[Any]]]  # (number, the values of the columns asked for)


def splits(data: config.Text) -> dict[str, Texts]:
    """Returns the texts of `train`, and of `validation` and `test` where there is a file for it.

    Labels are `[n]` int32, positions in `class_names`, the same for all splits; without a label column all 0, and no
    names. Ids are `FILE:RECORD`, see `records`.

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
            f"there are {_shown(names)}"
        )
    if not rows:
        raise UserError(f"{where}: {'no record has a label of data.classes' if labels else 'there are no records'}")
    if empty := [ids[row] for row in rows if not texts[row].strip()]:
        raise UserError(f"no text in {_shown(empty, 5)}, {len(empty)} of {len(labels)} records: remove them")
    numbers = np.array([number[labels[row]] for row in rows], np.int32)
    if names and len(np.unique(numbers)) < 2:
        say(f"{where}: all labels are {labels[rows[0]]!r}; ROC-AUC is not defined there")
    return Texts(numbers, names, tuple(ids[row] for row in rows), tuple(texts[row] for row in rows))


def records(path: Path, text_column: str, label_column: str = "") -> Iterator[tuple[int, str, str]]:
    """Yields (number, text, label) of each record of a file, in its order.

    Records are numbered from 1, the header of a CSV file not counted; in JSON lines and `.txt` the number is that of
    the line. A text is as it stands, '' for null. A label is stripped, a number written out, the whole ones without
    a fraction (`1.0` as '1'), and '' for null or without `label_column`.

    Raises:
        UserError: no such column, or the file is not what its suffix says; where, and what to do.
    """
    read = _READERS.get(path.suffix.lower())
    if not read:
        raise UserError(f"{path}: texts are read from {', '.join(_READERS)}, told apart by the suffix")
    columns = [text_column, label_column] if label_column else [text_column]
    try:
        for number, values in read(path, columns):
            strings = [_string(value, path, number, column) for value, column in zip(values, columns, strict=True)]
            yield number, strings[0], strings[1].strip() if label_column else ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


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
        held = sorted(name for name in os.listdir(path.parent) if Path(name).suffix.lower() in _READERS)
    return f"there is no {path}{suggest(path.name, held)}; the folder holds {_shown(held) or 'no texts'}"


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
        for number, text, label in records(path, data.text_column, data.label_column):
            ids.append(f"{name}:{number}")
            texts.append(text)
            labels.append(kept.setdefault(label, label))
    if data.label_column and "" in kept:
        empty = [name for name, label in zip(ids, labels, strict=True) if not label]
        where = f"{_shown(empty, 5)}, {len(empty)} of {len(ids)} records"
        raise UserError(f"no {data.label_column!r} in {where}: fill it in, or remove them")
    return ids, texts, labels


def _class_names(labels: Sequence[str], data: config.Text) -> tuple[str, ...]:
    present = sorted(set(labels))
    for name in data.classes:
        if name not in present:
            raise UserError(
                f"data.classes: no training text has the label {name!r}{suggest(name, present)}; "
                f"there are {_shown(present)}"
            )
    if len(present) == 1:
        raise UserError(
            f"all training texts have the label {present[0]!r}, and a classifier needs two: is "
            f"data.label_column={data.label_column} the right column?"
        )
    return data.classes or tuple(present)


def _string(value: Any, path: Path, number: int, column: str) -> str:
    if isinstance(value, str):
        # JSON can name half of a surrogate pair, as tweets cut in the middle of an emoji do; no tokenizer takes it.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float | Decimal) and value % 1 == 0:
        return str(int(value))
    if isinstance(value, int | float | Decimal):
        return str(value)
    kind = type(value).__name__
    raise UserError(f"{path}, record {number}: {column!r} holds a {kind}; a string or a number is wanted")


def _positions(names: Sequence[str], columns: Sequence[str], where: str) -> list[int]:
    for column, field in zip(columns, ("data.text_column", "data.label_column"), strict=False):
        if names.count(column) > 1:
            raise UserError(f"{where} has {names.count(column)} columns {column!r}; rename all but one")
        if column not in names:
            valid = _shown(names) + ", or to nothing for texts without labels" * (field == "data.label_column")
            raise UserError(f"{where} has no column {column!r}{suggest(column, names)}: set {field} to one of {valid}")
    return [names.index(column) for column in columns]


def _shown(names: Sequence[str], most: int = 20) -> str:
    """Returns the first names for a message: one line, whatever is in them."""
    short = [" ".join(name.split()) for name in names[:most]]
    return ", ".join(name if len(name) <= 40 else name[:40] + ".." for name in short) + ", .." * (len(names) > most)


# --- one reader for each format --------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, with their ends; a mark of the byte order is left out."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                text = line.decode()
                wrong = start + line.index(b"\0") if b"\0" in line else None
            except UnicodeDecodeError as error:
                wrong = start + error.start
            if wrong is not None:
                raise UserError(f"{path} is not UTF-8 text: see the byte at offset {wrong}; save it as UTF-8")
            # A line may end in a carriage return alone, which bytes are not divided at.
            yield from io.StringIO(text if start else text.removeprefix("\ufeff"), newline="")
            start += len(line)


def _csv(path: Path, columns: Sequence[str], delimiter: str = ",") -> _Rows:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long article; it holds for the process
    # Strict: a quote that is never closed is an error, and does not take the rest of the file for one field.
    rows = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        positions = _positions(header, columns, str(path))
        for number, row in enumerate(filter(None, rows), 1):  # a blank line is no record
            if len(row) != len(header):
                raise UserError(
                    f"{path}, record {number}: {len(row)} fields, and the header has {len(header)}; put double quotes "
                    f"around fields with a {'tab' if delimiter != ',' else 'comma'} or a line break"
                )
            yield number, [row[position] for position in positions]
    except csv.Error as error:
        raise UserError(
            f"{path}: the record that ends in line {rows.line_num} is damaged ({error}); close every double quote, and "
            "double those inside a quoted field"
        ) from None


def _tsv(path: Path, columns: Sequence[str]) -> _Rows:
    return _csv(path, columns, "\t")


def _json_lines(path: Path, columns: Sequence[str]) -> _Rows:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); each line is one object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a {type(row).__name__}; each line is one object {{..}}")
        _positions(list(row), columns, f"{path}, line {number},")
        yield number, [row[column] for column in columns]


def _parquet(path: Path, columns: Sequence[str]) -> _Rows:
    import pyarrow  # takes half a second, and only this format needs it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _positions(file.schema_arrow.names, columns, str(path))
            for batch in file.iter_batches(columns=list(columns)):
                for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                    number += 1
                    yield number, list(values)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or not Parquet, after record {number}: {reason}") from None


def _txt(path: Path, columns: Sequence[str]) -> _Rows:
    if len(columns) > 1:
        raise UserError(
            f"{path} holds texts without labels: --set data.label_column= (empty), or give a file with columns"
        )
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield number, [line.rstrip("\r\n")]


_READERS = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
    ".txt": _txt,
}
