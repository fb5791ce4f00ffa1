"""Arrays kept in a folder for the runs to come, by key: a cache of limited size, which several runs may share.

KEY/array.bin    the raw bytes
KEY/array.json   shape, dtype, SHA-256 of the bytes, and what they are, in words

An entry is made under a temporary name and renamed, so that what is there under a key is complete; it is checked even
so when it is opened. Whoever writes or maps an array holds a lock on its file: nobody deletes that, and what has no
owner any more is known at once, however its run ended.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from jaxtl import storage
from jaxtl.progress import say

ARRAY, DESCRIPTION = "array.bin", "array.json"
_KEY = re.compile("[0-9a-f]{64}")  # whatever else lies in the folder is not ours to delete
_TEMPORARY = ".jaxtl-"
_TURN = ".lock"  # held by the process that deletes to make room, or begins an entry
_KEYS = ".keys"  # of its bytes one for each key is held by the process that makes that entry
# On a file system without locks: a temporary folder in which nothing was written for so many seconds has no owner, and
# an entry that nobody has opened for so many is not in use.
_ABANDONED, _UNUSED = 3600.0, 7 * 86400.0
# Bytes left free on the disk: the run's own results are worth more than what can be computed again.
_SPARE = 10**9


class Store:
    """The arrays in one folder."""

    def __init__(self, folder: Path, limit: float):
        """`limit` is the bytes that all arrays may take together."""
        self.folder = folder
        self._limit = limit
        self._used: set[str] = set()  # never deleted to make room

    def load(self, key: str, shape: tuple[int, ...], dtype: np.dtype, *, mapped: bool) -> np.ndarray | None:
        """Returns an array that was kept, read-only and memory-mapped or in memory; None where there is none.

        A damaged one is said and removed. One that is sound counts as used now.
        """
        entry = self.folder / key
        if not os.path.isdir(entry):
            return None
        try:
            array = _open(entry, shape, dtype)
        except (FileNotFoundError, ValueError) as error:
            if os.path.isdir(entry):  # not deleted by another run meanwhile
                say(f"damaged cache entry {entry}: {error}; it is removed and computed anew")
                self._remove(entry)
            return None
        except OSError as error:
            say(f"cache entry {entry} cannot be read: {error.strerror or error}; it is computed anew")
            return None
        self._used.add(key)
        with contextlib.suppress(OSError):  # a folder for reading alone
            os.utime(entry)
        return array if mapped else np.array(array)

    @contextlib.contextmanager
    def alone(self, keys: Iterable[str]) -> Iterator[None]:
        """Has the processes that would make one of these entries go through the `with` block one after the other.

        Where the folder cannot be written to, or its file system has no locks, they go through it at once.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((self.folder / _KEYS).open("a+b"))
                for place in sorted(int(key[:15], 16) for key in keys) if fcntl else ():  # or two would wait for ever
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                    except (BlockingIOError, PermissionError):
                        say(f"another run is at work on the same entry of {self.folder}: waiting for it")
                        fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
            yield

    @contextlib.contextmanager
    def create(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype, words: Mapping[str, Any]
    ) -> Iterator["Incomplete"]:
        """Yields an array to be filled, its space reserved; what is not kept by the end of the `with` block is removed.

        Arrays used longest ago are deleted until all fit the limit and the disk, if that can be reached.

        Args:
            key: a SHA-256 in hexadecimal.
            shape, dtype: of the array.
            words: what it is, for people who look.

        Raises:
            OSError: there is no room, or the folder cannot be written to.
        """
        size = math.prod(shape) * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary()
        try:
            with storage.turn(self.folder / _TURN):  # what is not locked yet is not to be taken for abandoned
                self._remove_abandoned()
                self._make_room(size)
                temporary.mkdir()
                file = (temporary / ARRAY).open("w+b")
                _lock(file)
            storage.reserve(file.fileno(), size)
            array = _mapped(file, dtype, "r+", shape)
            yield Incomplete(self, key, temporary, array, words)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        entries, taken = [], size
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # deleted by another run meanwhile
                bytes_taken = (path / ARRAY).stat().st_size
                taken += bytes_taken
                if _KEY.fullmatch(path.name) and path.name not in self._used and not _in_use(path):
                    entries.append((path.stat().st_mtime, bytes_taken, path))
        over, lacking = taken - self._limit, size + _SPARE - shutil.disk_usage(self.folder).free

        def check(freed: int) -> None:
            if over > freed:
                raise OSError(f"the limit of {self._limit / 1e9:g} GB leaves no room for {size / 1e9:.3g} GB")
            if lacking > freed:
                room = f"{size / 1e9:.3g} GB would leave less than {_SPARE / 1e9:g} GB on the disk"
                raise OSError(errno.ENOSPC, room)

        check(sum(bytes_taken for _, bytes_taken, _ in entries))  # before anything is deleted in vain
        freed = 0
        for _, bytes_taken, path in sorted(entries):
            if max(over, lacking) <= freed:
                break
            freed += bytes_taken * self._remove(path)
        check(freed)

    def _remove(self, entry: Path) -> bool:
        """Under another name first: half an entry is not to be found. Returns whether it could be done."""
        doomed = self._temporary()
        try:
            entry.rename(doomed)
            shutil.rmtree(doomed)
        except OSError:  # another run was faster, or the folder is for reading alone
            return False
        return True

    def _remove_abandoned(self) -> None:
        for folder in self.folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if not _in_use(folder):
                    shutil.rmtree(folder)

    def _temporary(self) -> Path:
        return self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"


class Incomplete:
    """An entry on the way.

    Attributes:
        array: memory-mapped, to be filled.
    """

    def __init__(self, store: Store, key: str, folder: Path, array: np.memmap, words: Mapping[str, Any]):
        self.array = array
        self._store, self._key, self._folder, self._words = store, key, folder, words

    def fill(self, array: np.ndarray) -> None:
        """Copies an array like it, in a tenth of the time that it takes through the mapping, page by page.

        Raises:
            OSError: it could not be written.
        """
        file = self.array.lock
        file.seek(0)
        file.write(array.reshape(-1).view(np.uint8))
        file.flush()

    def keep(self) -> np.ndarray:
        """Makes the filled array an entry. Returns it, or that of another run which made the same one meanwhile.

        Raises:
            OSError: it could not be written. The array can still be read.
        """
        self.array.flush()
        description = {
            "shape": list(self.array.shape),
            "dtype": self.array.dtype.name,
            "sha256": _digest(self.array),
            "holds": self._words,
        }
        with (self._folder / DESCRIPTION).open("w", encoding="utf-8") as file:
            json.dump(description, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        target = self._store.folder / self._key
        try:
            self._folder.rename(target)
        except OSError:
            theirs = self._store.load(self._key, self.array.shape, self.array.dtype, mapped=True)
            if theirs is None:
                raise
            return theirs
        self._store._used.add(self._key)
        kept = self.array.view()
        kept.setflags(write=False)
        return kept


def _lock(file: BinaryIO) -> None:
    """Says that an array is in use, until the file is closed; where the file system has no locks, says nothing."""
    with contextlib.suppress(OSError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for `_in_use`, a moment


def _in_use(folder: Path) -> bool:
    """Whether a process writes or maps the array in a folder; where that cannot be told, whether one may."""
    with contextlib.suppress(OSError):  # no such file, or no locks
        try:
            with (folder / ARRAY).open("r+b") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return False
        except (BlockingIOError, PermissionError):  # of another user: not ours to delete
            return True
    idle = _ABANDONED if folder.name.startswith(_TEMPORARY) else _UNUSED
    with contextlib.suppress(OSError):  # deleted meanwhile
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < idle
    return False


def _open(entry: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Returns the array of an entry, checked; raises ValueError, or OSError, where something is wrong with it."""
    description = json.loads((entry / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(description, dict):
        raise ValueError(f"{DESCRIPTION} is no description")
    expected = {"shape": list(shape), "dtype": dtype.name}
    found = {name: description.get(name) for name in expected}
    if found != expected:
        raise ValueError(f"it holds {found}, not {expected}")
    file = (entry / ARRAY).open("rb")  # closed when the array is gone
    _lock(file)
    size, bytes_expected = os.fstat(file.fileno()).st_size, math.prod(shape) * dtype.itemsize
    if size != bytes_expected:
        raise ValueError(f"{ARRAY} has {size} bytes, not {bytes_expected}")
    array = _mapped(file, dtype, "r", shape)
    if _digest(array) != description.get("sha256"):
        raise ValueError(f"{ARRAY} is not what was written, by its SHA-256")
    return array


def _mapped(file: BinaryIO, dtype: np.dtype, mode: str, shape: tuple[int, ...]) -> np.memmap:
    """Returns what a file holds, which stays locked as long as the array lives."""
    # No system maps what is empty: of several processes, one may have nothing of a small split.
    array = np.memmap(file, dtype, mode, shape=shape) if math.prod(shape) else np.empty(shape, dtype).view(np.memmap)
    array.lock = file
    return array


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()
