"""A folder in a bucket: pushed there as one whole state after another, and pulled from there.

In the bucket are, below the folder's URL,

manifest.json   path -> name of its object, size and SHA-256 of every file; written last, so that it always describes
                a whole state of the folder, whatever is killed when
pending.json    names of objects that a push adds or removes, for the next to clean up where that one did not end
owner.json      see `jaxtl.remote`
..              the files, each under its own path; one whose content has changed has part of its digest in the name, so
                that the objects of the last manifest stay as they are until there is another

Reached through fsspec (gcsfs for gs://), as `etils.epath` does it too, which would keep lists of what was there.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jaxtl import storage
from jaxtl.errors import Outage, UserError
from jaxtl.progress import Bar

MANIFEST, OWNER, PENDING = OURS = ("manifest.json", "owner.json", "pending.json")

_AT_ONCE = 8  # requests
_TRIES = 20  # to read, or to take a snapshot of, what changes meanwhile
# Folders in which Orbax has put files by renaming: these never change in place, and need not be copied to be uploaded.
_FINAL, _GROWING = {"checkpoints", "trained", "frozen"}, {"metrics.jsonl", "tensorboard"}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # of the local one, see `jaxtl.cli`

Files = dict[str, dict[str, Any]]  # what a manifest lists, by path


class Bucket:
    """The objects below a URL, by name; errors are told in one line.

    Every method raises UserError where there is no access, and Outage for what passes.
    """

    def __init__(self, url: str):
        # Objects are put, got and deleted whole, which needs no gRPC; gcsfs would ask for the bucket's kind by that, of
        # every call where it may not know, and wait for a minute where there is no answer. Read when it is imported.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        for name in ("gcsfs", "fsspec"):  # they log errors that they raise as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.url = url
        protocol, _, rest = url.partition("://")
        name, _, folder = rest.strip("/").partition("/")
        if not folder:
            where = f"{protocol}://{name or 'BUCKET'}"
            raise UserError(f"{url} names no folder in a bucket: give one, as in {where}/runs/x")
        try:
            import fsspec

            with self._told():
                self._files, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError:
            how = "pip install 'jaxtl[gcs]'" if protocol == "gs" else f"install what fsspec needs for {protocol}://"
            raise UserError(f"{url}: {protocol}:// cannot be read here: {how}") from None

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, ImportError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            what = f"{self.url} cannot be reached: {one_line(error)}"
            code = str(getattr(error, "code", ""))
            mistaken = isinstance(error, PermissionError | ValueError) or str(error).startswith("Forbidden")
            raise (UserError if mistaken or code in ("400", "401", "403") else Outage)(what) from None

    def read(self, name: str) -> bytes:
        """Returns what an object holds; nothing where it is not there."""
        try:
            with self._told():
                return self._files.cat_file(f"{self._path}/{name}")
        except FileNotFoundError:
            return b""

    def read_json(self, name: str, otherwise: Any) -> Any:
        """Returns what an object holds as JSON; `otherwise` where it is not there, or holds none of that kind."""
        try:
            value = json.loads(self.read(name) or "null")
        except ValueError:
            return otherwise
        return value if isinstance(value, type(otherwise)) else otherwise

    def write(self, name: str, data: bytes) -> None:
        """Writes an object whole."""
        with self._there(), self._told():
            self._files.pipe_file(f"{self._path}/{name}", data)

    def put(self, name: str, file: Path) -> None:
        """Uploads a file."""
        with self._there(), self._told():
            self._files.put_file(str(file), f"{self._path}/{name}")

    def get(self, name: str, file: Path) -> None:
        """Downloads a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self._told():
            self._files.get_file(f"{self._path}/{name}", str(file))

    def delete(self, name: str) -> None:
        """Deletes an object that may be there."""
        with contextlib.suppress(FileNotFoundError), self._told():
            self._files.rm_file(f"{self._path}/{name}")

    def names(self) -> set[str]:
        """Returns the names of objects and of folders."""
        try:
            with self._told():
                found = self._files.ls(self._path, detail=False)
                # Without the empty object that the Cloud Console makes of a folder.
                return {PurePosixPath(path).name for path in found if path.rstrip("/") != self._path}
        except FileNotFoundError:
            return set()

    def glob(self, between: str) -> list[str]:
        """Returns the URLs of manifests in folders, which `between` and the URL describe with `*`."""
        with contextlib.suppress(FileNotFoundError), self._told():
            pattern = f"{self._path}/{between}{MANIFEST}"
            return [self._files.unstrip_protocol(path) for path in self._files.glob(pattern)]
        return []

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:  # of what is written: that into which it would be
            raise UserError(f"{self.url}: there is no such bucket") from None


class Pushed:
    """What a bucket holds of a folder, which `push` makes what the folder holds now."""

    def __init__(self, bucket: "Bucket", folder: Path, text: str, based: Path, check: Callable[[], None]):
        """`text` is the manifest; the file `based` is told of the next; `check` raises where it must not be pushed."""
        self._bucket, self._folder, self._text, self._based, self._check = bucket, folder, text, based, check
        self._files = listed(text, bucket.url)
        self._known: dict[str, tuple[tuple, dict[str, Any]]] = {}  # what is pushed: path -> signature, entry
        self._garbage = {name for name in bucket.read_json(PENDING, []) if isinstance(name, str)}

    def push(self, title: str | None = None) -> None:
        """Pushes what has changed, if anything has; shows a bar where it has a title."""
        stage = self._based.with_suffix(".stage")
        try:
            for _ in range(_TRIES):
                with contextlib.suppress(_Changed):
                    found, new = self._snapshot(stage)
                    break
            else:
                raise UserError(f"{self._folder} changes faster than it can be copied")
            entries = {path: self._entry(path, stage / path) if path in new else self._known[path][1] for path in found}
            if entries != self._files or self._garbage:
                self._upload(entries, stage, title)
            self._known = {path: (signature, entries[path]) for path, signature in found.items()}
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _snapshot(self, stage: Path) -> tuple[dict[str, tuple], set[str]]:
        """Returns the folder's files with their signatures, and which are new: copied into `stage`, all at one time."""
        shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed
        found = _walk(self._folder)
        new = {path for path, signature in found.items() if self._known.get(path, (None,))[0] != signature}
        for path in new:
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                _copy(self._folder / path, stage / path, final=_final(PurePosixPath(path)))
            except FileNotFoundError:
                raise _Changed from None
        if found.keys() - _walk(self._folder).keys():  # the checkpoint manager keeps the last few
            raise _Changed
        return found, new

    def _entry(self, path: str, file: Path) -> dict[str, Any]:
        entry = {"size": file.stat().st_size, "sha256": _sha256(file)}
        before = self._files.get(path)
        if before and {**before, **entry} == before:
            return before
        if before or path in OURS:
            pure = PurePosixPath(path)
            path = str(pure.with_name(f"{pure.stem}.{entry['sha256'][:12]}{pure.suffix}"))
        return {"object": path, **entry}

    def _upload(self, entries: Files, stage: Path, title: str | None) -> None:
        bucket = self._bucket
        before = {entry["object"] for entry in self._files.values()}
        now = {entry["object"] for entry in entries.values()}
        self._check()
        self._garbage |= before ^ now
        bucket.write(PENDING, json.dumps(sorted(self._garbage)).encode())
        adding = [(entry["object"], stage / path) for path, entry in entries.items() if entry["object"] not in before]
        _each(lambda pair: bucket.put(*pair), adding, title)
        text = json.dumps({"files": entries}, indent=1)
        # Both: the process may end, or not hear that it was written, at the next line.
        storage.write(self._based, json.dumps([self._text, text]))
        self._check()
        bucket.write(MANIFEST, text.encode())
        self._files, self._text = entries, text
        storage.write(self._based, json.dumps([text]))
        self._check()
        _each(bucket.delete, sorted(self._garbage - now))
        self._garbage = set()


def pull(bucket: Bucket, folder: Path, wanted: Callable[[str], bool] = lambda path: True) -> str:
    """Makes a folder hold those files of a manifest that are wanted, and none that it does not list; returns it.

    What is there and has the right digest is not fetched again.

    Raises:
        UserError: an object is not what the manifest says.
    """
    for _ in range(_TRIES):
        text = bucket.read(MANIFEST).decode()
        files = listed(text, bucket.url)
        folder.mkdir(parents=True, exist_ok=True)
        for path in _walk(folder, all_files=True).keys() - files.keys():
            (folder / path).unlink(missing_ok=True)
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):  # it holds something
                if path != str(folder):
                    os.rmdir(path)
        missing = [
            (path, entry)
            for path, entry in files.items()
            if wanted(path) and not _same(folder / path, entry["size"], entry["sha256"])
        ]
        try:
            _each(lambda item: _fetch(bucket, folder, *item), missing, "downloading")
        except _Changed as error:
            changed = error  # the run that pushes has removed it, after it has written the next manifest
            continue
        return text
    raise UserError(f"{bucket.url} is damaged: {changed}")


def _final(path: PurePosixPath) -> bool:
    """Whether a file never changes in place; a suite may have a member called "trained"."""
    return bool(_FINAL & set(path.parts)) and not _GROWING & set(path.parts)


def _copy(source: Path, target: Path, *, final: bool) -> None:
    if final:
        with contextlib.suppress(PermissionError, NotImplementedError):  # a file system without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _fetch(bucket: Bucket, folder: Path, path: str, entry: dict[str, Any]) -> None:
    target = folder / path
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        bucket.get(entry["object"], temporary)
        if not _same(temporary, entry["size"], entry["sha256"]):
            raise _Changed(f"{entry['object']} is not what {MANIFEST} says")
        temporary.replace(target)
    except FileNotFoundError:
        raise _Changed(f"{entry['object']} is not there") from None
    finally:
        temporary.unlink(missing_ok=True)


def listed(text: str, url: str) -> Files:
    """Returns what a manifest lists; nothing where there is none."""
    try:
        files = json.loads(text)["files"] if text else {}
        for path, entry in files.items():
            int(entry["size"]), str(entry["sha256"]), str(entry["object"])
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{path} leads out of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url}/{MANIFEST} is damaged, or no run's: {error}") from None
    return files


class _Changed(Exception):
    """What is read or copied is no longer what it was."""


def _walk(folder: Path, all_files: bool = False) -> dict[str, tuple]:
    """Returns the files of a folder with what tells that one has changed; temporary ones and locks only if told to.

    A folder's own files are looked at before those in its folders: where result.json is seen, all else is there.
    """
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if all_files or not _temporary(name)]
        for name in names:
            file = Path(path, name)
            if all_files or not _temporary(name):
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    found[file.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def _temporary(name: str) -> bool:
    return name == "lock" or ".orbax-checkpoint-tmp" in name or (name.startswith(".") and name.endswith(".tmp"))


def described(folder: Path) -> Files:
    """Returns what a manifest would say of a folder, without names of objects."""
    return {path: {"size": found[0], "sha256": _sha256(folder / path)} for path, found in _walk(folder).items()}


def plain(files: Files) -> Files:
    """Returns what a manifest lists, without names of objects."""
    return {path: {"size": entry["size"], "sha256": entry["sha256"]} for path, entry in files.items()}


def _same(file: Path, size: int, sha256: str) -> bool:
    return file.is_file() and file.stat().st_size == size and _sha256(file) == sha256


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _each(function: Callable[[Any], None], items: Collection[Any], title: str | None = None) -> None:
    """Calls the function with every item, several at once; raises the first error."""
    with (
        concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
        Bar(title, len(items)) if title and items else contextlib.nullcontext() as bar,
    ):
        waiting = [pool.submit(function, item) for item in items]
        try:
            for done in concurrent.futures.as_completed(waiting):
                done.result()
                if bar:
                    bar.advance(note="files")
        finally:
            pool.shutdown(cancel_futures=True)


def one_line(error: Exception) -> str:
    """Returns what an error says, at most 300 characters of it."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
