"""Records of a text file: CSV, TSV, JSON lines, Parquet, or a text on each line; read one after the other, none kept.

`read` ends with the first record that is not in order, `answerable` goes on after it.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from jaxtl.errors import UserError, suggest

_Columns = Sequence[tuple[str, str]]  # (name, the setting that gives it)
# (number, the values of the columns, or why they cannot be had). What ends the reading is raised.
_Rows = Iterator[tuple[int, list[Any] | UserError]]

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
_PROBED = 20  # records of which one must be readable, or the file is not what it should be
_PARQUET_ROWS = 1024  # held in memory at once


def read(path: Path, text_column: str, label_column: str = "") -> Iterator[tuple[int, str, str]]:
    """Yields (number, text, label) of each record of a file, in its order.

    Records are numbered from 1, the header of a CSV file not counted; in JSON lines and `.txt` the number is that of
    the line. A text is as it stands, '' for null. A label is stripped, a number written out, the whole ones without
    a fraction (`1.0` as '1'), and '' for null or without `label_column`.

    Raises:
        UserError: no such column, or the file is not what its suffix says; where, and what to do.
    """
    columns = [(text_column, "data.text_column")] + [(label_column, "data.label_column")] * bool(label_column)
    for number, strings in _strings(path, columns):
        if isinstance(strings, UserError):
            raise strings
        yield number, strings[0], strings[1].strip() if label_column else ""


def answerable(path: Path, text_column: str, setting: str) -> Iterator[tuple[int, str | UserError]]:
    """Yields (number, text) as `read` does, and an error in place of a text that cannot be read.

    Where a file is damaged so that nothing more of it can be read, that is its last record.

    Args:
        path: the file.
        text_column: name of the column that holds the texts.
        setting: what the user sets to name another one, for errors.
    """
    number = 0
    try:
        for number, strings in _strings(path, [(text_column, setting)]):
            yield number, strings if isinstance(strings, UserError) else strings[0]
    except UserError as error:
        yield number + 1, UserError(f"{error}; the rest of the file was not read")


def probe(path: Path, text_column: str, setting: str) -> None:
    """Looks for a record that can be read among the first ones of a file; arguments as in `answerable`.

    Raises:
        UserError: there is none; says why, for example that there is no such column.
    """
    first = None
    for _, strings in itertools.islice(_strings(path, [(text_column, setting)]), _PROBED):
        if not isinstance(strings, UserError):
            return
        first = first or strings
    raise first or UserError(f"{path} holds no texts")


def whole(text: str) -> str:
    """Returns a text without halves of surrogate pairs, which no tokenizer takes.

    JSON can name such a half, as tweets cut in the middle of an emoji do; the command line has them in place of bytes
    that are not UTF-8.
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shown(names: Sequence[str], most: int = 20) -> str:
    """Returns the first names for a message: one line, whatever is in them."""
    short = [" ".join(name.split()) for name in names[:most]]
    return ", ".join(name if len(name) <= 40 else name[:40] + ".." for name in short) + ", .." * (len(names) > most)


def _strings(path: Path, columns: _Columns) -> Iterator[tuple[int, list[str] | UserError]]:
    """Yields (number, the values of the columns as text, or why they cannot be had)."""
    read = READERS.get(path.suffix.lower())
    if not read:
        raise UserError(f"{path}: texts are read from {', '.join(READERS)}, told apart by the suffix")
    try:
        for number, values in read(path, columns):
            if isinstance(values, list):
                try:
                    values = [
                        _string(value, path, number, name) for value, (name, _) in zip(values, columns, strict=True)
                    ]
                except UserError as error:
                    values = error
            yield number, values
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _string(value: Any, path: Path, number: int, column: str) -> str:
    if isinstance(value, str):
        return whole(value)
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float | Decimal) and value % 1 == 0:
        return str(int(value))
    if isinstance(value, int | float | Decimal):
        return str(value)
    kind = type(value).__name__
    raise UserError(f"{path}, record {number}: {column!r} holds a {kind}; a string or a number is wanted")


def _positions(names: Sequence[str], columns: _Columns, where: str) -> list[int]:
    if not names:
        raise UserError(f"{where} has no columns: it is empty")
    for column, setting in columns:
        if names.count(column) > 1:
            raise UserError(f"{where} has {names.count(column)} columns {column!r}; rename all but one")
        if column not in names:
            valid = shown(names) + ", or to nothing for texts without labels" * (setting == "data.label_column")
            raise UserError(
                f"{where} has no column {column!r}{suggest(column, names)}: set {setting} to one of {valid}"
            )
    return [names.index(column) for column, _ in columns]


# --- one reader for each format --------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str | UserError]:
    """Yields the lines of a UTF-8 file, with their ends, or what is wrong with one; no mark of the byte order."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                text = line.decode()
                wrong = start + line.index(b"\0") if b"\0" in line else None
            except UnicodeDecodeError as error:
                wrong = start + error.start
            if wrong is not None:
                yield UserError(f"{path} is not UTF-8 text: see the byte at offset {wrong}; save it as UTF-8")
            else:
                # A line may end in a carriage return alone, which bytes are not divided at.
                yield from io.StringIO(text if start else text.removeprefix("\ufeff"), newline="")
            start += len(line)


def _undamaged(lines: Iterator[str | UserError]) -> Iterator[str]:
    for line in lines:
        if isinstance(line, UserError):
            raise line
        yield line


def _csv(path: Path, columns: _Columns, delimiter: str = ",") -> _Rows:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long article; it holds for the process
    # Strict: a quote that is never closed is an error, and does not take the rest of the file for one field.
    rows = csv.reader(_undamaged(_lines(path)), delimiter=delimiter, strict=True)
    try:
        filled = filter(None, rows)  # a blank line is no record
        header = [name.strip() for name in next(filled, [])]
        if len(header) == 1 and (other := next((mark for mark in _SEPARATORS if mark in header[0]), None)):
            raise UserError(
                f"{path}: its columns seem to be divided by {_SEPARATORS[other]}: save it with commas, or with tabs as "
                ".tsv"
            )
        positions = _positions(header, columns, str(path))
        for number, row in enumerate(filled, 1):
            if len(row) != len(header):
                yield (
                    number,
                    UserError(
                        f"{path}, record {number}: {len(row)} fields, and the header has {len(header)}; put double "
                        f"quotes around fields with a {'comma' if delimiter == ',' else 'tab'} or a line break"
                    ),
                )
            elif delimiter == "\t" and any("\t" in field for field in row):
                # A quote that a text begins with was taken for one around the field, and the next record for its end.
                yield (
                    number,
                    UserError(
                        f"{path}, record {number}: a tab within double quotes, as where a text begins with one: put "
                        "double quotes around that field, and double those inside it; or take the tab out"
                    ),
                )
            else:
                yield number, [row[position] for position in positions]
    except csv.Error as error:
        raise UserError(
            f"{path}: the record that ends in line {rows.line_num} is damaged ({error}); close every double quote, and "
            "double those inside a quoted field"
        ) from None


def _tsv(path: Path, columns: _Columns) -> _Rows:
    return _csv(path, columns, "\t")


def _json_lines(path: Path, columns: _Columns) -> _Rows:
    for number, line in enumerate(_lines(path), 1):
        if isinstance(line, UserError) or line.strip():
            try:
                yield number, _json_values(line, columns, f"{path}, line {number}")
            except UserError as error:
                yield number, error


def _json_values(line: str | UserError, columns: _Columns, where: str) -> list[Any]:
    if isinstance(line, UserError):
        raise line
    if line.lstrip().startswith("["):
        raise UserError(f"{where}: a list; each line is one object {{..}}: write those of the list a line each")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line is one object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}; each line is one object {{..}}")
    _positions(list(row), columns, f"{where},")
    return [row[name] for name, _ in columns]


def _parquet(path: Path, columns: _Columns) -> _Rows:
    import pyarrow  # takes half a second, and only this format needs it
    import pyarrow.parquet

    number, names = 0, [name for name, _ in columns]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _positions(file.schema_arrow.names, columns, str(path))
            for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
                for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    number += 1
                    yield number, list(values)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or not Parquet, after record {number}: {reason}") from None


def _txt(path: Path, columns: _Columns) -> _Rows:
    if len(columns) > 1:
        raise UserError(
            f"{path} holds texts without labels: --set data.label_column= (empty), or give a file with columns"
        )
    for number, line in enumerate(_lines(path), 1):
        if isinstance(line, UserError):
            yield number, line
        elif line.strip():
            yield number, [line.rstrip("\r\n")]


READERS = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
    ".txt": _txt,
}
"""What reads a file of texts, by its suffix."""
