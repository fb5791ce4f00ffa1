"""Where files go, and files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxtl.errors import UserError


def cache_folder() -> Path:
    """Returns the folder for what can be made or fetched again: `$JAXTL_CACHE`, or `~/.cache/jaxtl`."""
    return Path(os.path.expanduser(os.environ.get("JAXTL_CACHE") or "~/.cache/jaxtl"))


def reserve(descriptor: int, size: int) -> None:
    """Makes an open file `size` bytes long, all of them on the disk.

    Without the space reserved, a full disk would end the process with SIGBUS when a mapped file is written to. macOS
    cannot reserve it.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with written_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def written_whole(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """Opens a file to be written whole or not at all: under another name, which is changed when it is complete.

    Text is UTF-8, its line ends as written.

    Raises:
        UserError: the folder does not exist, cannot be written to, or is full.
    """
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with temporary.open("wb") if binary else temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave an empty file under the new name
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it was never made
            temporary.unlink()
