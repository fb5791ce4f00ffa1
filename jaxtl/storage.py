"""Where files go, and files that are written whole or not at all."""

import contextlib
import datetime
import glob
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes apart
    fcntl = None

from jaxtl.errors import UserError

# How a folder is renamed that makes room for a new one.
_ASIDE = "%Y%m%d-%H%M%S-%f"
_TEMPORARY = ".tmp"
_LEFT = 86400.0  # seconds after which nobody writes any more to what has a temporary name
_ASIDE_NAME = re.compile(r".+\.\d{8}-\d{6}-\d{6}")


def cache_folder() -> Path:
    """Returns the folder for what can be made or fetched again: `$JAXTL_CACHE`, or `~/.cache/jaxtl`."""
    return Path(os.path.expanduser(os.environ.get("JAXTL_CACHE") or "~/.cache/jaxtl"))


def lock(path: Path, what: str) -> IO[str]:
    """Locks a file, and returns it: until it is closed or the process ends, the lock is this one's. It tells whose.

    Args:
        path: of the file, which is made.
        what: it stands for, to be told to others.

    Raises:
        UserError: another process has the lock, or the file cannot be written.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{what} is in use by {owner}: wait until it has ended, or give another --workdir") from None
    except OSError:
        from jaxtl.progress import say  # not needed by those who ask for --help

        say(f"{path.parent} is on a file system without locks: nothing keeps two processes from {what}")
    with contextlib.suppress(OSError):  # a full disk: others are refused without being told by whom
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Has processes go through the `with` block one after the other, where the file system has locks.

    Args:
        path: of the file that is locked meanwhile, which is made.
    """
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reserve(descriptor: int, size: int) -> None:
    """Makes an open file `size` bytes long, all of them on the disk.

    Without the space reserved, a full disk would end the process with SIGBUS when a mapped file is written to. macOS
    cannot reserve it.

    Raises:
        OSError: there is no room.
    """
    if not size:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with written_whole(path) as file:
        file.write(text)


def _temporary(path: Path) -> Path:
    """Returns another name beside a path, which no other process has; what killed ones have left there is removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}"


@contextlib.contextmanager
def written_whole(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """Opens a file to be written whole or not at all: under another name, which is changed when it is complete.

    Text is UTF-8, its line ends as written.

    Raises:
        UserError: the folder does not exist, cannot be written to, or is full.
    """
    temporary = _temporary(path)
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


@contextlib.contextmanager
def folder_written_whole(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder to be filled whole or not at all: under another name, which is changed when it is complete.

    Args:
        path: where it will be; folders above it are made.
        overwrite: move aside what is there when the new one is complete.

    Raises:
        UserError: there is something already, or the folder cannot be written.
    """
    path = path.expanduser().resolve()
    temporary = _temporary(path)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: give the name of a folder")
        there = path.is_dir() and any(path.iterdir())
        if there and not overwrite:
            raise UserError(f"{path} is not empty: give another name, or --overwrite to move it aside")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if there:
            move_aside(path)
        elif path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_room(folder: Path, size: int) -> None:
    """Raises UserError where a file system has no room for so many bytes in a folder."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{size / 1e9:.2f} GB are needed and {folder.parent} has {free / 1e9:.2f} GB free: make room")


def moved_aside(folder: Path) -> bool:
    """Whether the folder's name is one that `move_aside` gives."""
    return bool(_ASIDE_NAME.fullmatch(folder.name))


def move_aside(folder: Path) -> Path:
    """Gives a folder another name, which says when, and returns that.

    Raises:
        UserError: that cannot be done.
    """
    aside = folder.with_name(f"{folder.name}.{datetime.datetime.now().strftime(_ASIDE)}")
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} cannot be moved aside: {error.strerror or error}") from None
    return aside
