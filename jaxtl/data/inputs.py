"""What a command line names to be predicted: texts, files of texts, images, folders of images. Read one by one.

Nothing is kept but the names of the files of one folder, so that there may be any number of inputs. One that cannot be
read is handed on as an error, and the next ones are read.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtl.data import folder, records
from jaxtl.errors import UserError

COLUMN = "--text_column"
ON_THE_COMMAND_LINE = "--text"


class Origin(NamedTuple):
    """Where an input came from.

    Attributes:
        file: its path as it was given, or below the folder that was; of texts on the command line `--text`.
        record: its number in the file, see `records.read`; None of images.
        text: the text itself; None of images, and where it could not be read.
    """

    file: str
    record: int | None = None
    text: str | None = None


def check(paths: Sequence[Path], classifies: str, run: str, column: str) -> None:
    """Looks whether the inputs are of the kind that a run takes.

    Args:
        paths: files and folders.
        classifies: `texts` or `images`.
        run: its name, for the message.
        column: of files of texts: the column that holds the texts.

    Raises:
        UserError: one of them is not; or is an empty folder, or a file of which no record can be read.
    """
    for path in paths:
        suffix = path.suffix.lower()
        if not path.exists():
            raise UserError(f"there is no file {path}")
        if classifies == "images":
            if path.is_dir():
                if next(_below(path), None) is None:
                    raise UserError(f"{path} holds no images; their names end in {', '.join(folder.EXTENSIONS)}")
            elif suffix in records.READERS:
                raise UserError(
                    f"{path} is a file of texts, and {run} classifies images: name images, or folders of them"
                )
        elif path.is_dir():
            raise UserError(
                f"{path} is a folder, and {run} classifies texts: name files ({', '.join(records.READERS)})"
            )
        elif suffix in folder.EXTENSIONS:
            raise UserError(
                f"{path} is an image, and {run} classifies texts: name files ({', '.join(records.READERS)})"
            )
        else:
            records.probe(path, column, COLUMN)


def texts(given: Sequence[str], paths: Sequence[Path], column: str) -> Iterator[tuple[Origin, str | UserError]]:
    """Yields texts: those given, then those of the files, in their order."""
    for number, text in enumerate(map(records.whole, given), 1):
        yield Origin(ON_THE_COMMAND_LINE, number, text), text
    for path in paths:
        name = records.whole(str(path))
        for number, text in records.answerable(path, column, COLUMN):
            yield Origin(name, number, None if isinstance(text, UserError) else text), text


def images(paths: Sequence[Path]) -> Iterator[tuple[Origin, Path | UserError]]:
    """Yields the paths of images: those given, and those below the folders given, sorted; hidden files are left out."""
    for given in paths:
        for path, fault in _below(given) if given.is_dir() else ((given, None),):
            yield Origin(records.whole(str(path))), fault or path


def _below(parent: Path) -> Iterator[tuple[Path, UserError | None]]:
    try:
        names = sorted(os.listdir(parent))
    except OSError as error:
        yield parent, UserError(f"the folder cannot be read: {error.strerror or error}")
        return
    for name in names:
        path = parent / name
        if name.startswith("."):
            continue
        if path.is_dir():
            if path.is_symlink():
                yield path, UserError("a symbolic link to a folder is not followed; name the folder itself")
            else:
                yield from _below(path)
        elif path.suffix.lower() in folder.EXTENSIONS:
            yield path, None
