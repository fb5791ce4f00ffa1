"""Run folders on object storage, `gs://BUCKET/runs/x`.

A run works in a local folder as ever, so that renames, locks and digests are those of a file system. It is pulled from
the bucket at the start, and pushed now and then and at the end: see `jaxtl.bucket`. Beside its files lies there

owner.json      who pushes; a run that finds another's token there stops

Local copies are below `remote/` in the cache: `work` for runs, `process-N` for the others of several processes, `read`
for the commands that read.
"""

import contextlib
import datetime
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jaxtl import hosts, interrupt, storage
from jaxtl.bucket import MANIFEST, OURS, OWNER, PENDING, Bucket, Pushed, described, listed, one_line, plain, pull
from jaxtl.errors import Outage, UserError
from jaxtl.progress import say

EVERY = 30.0  # seconds between two looks at what has changed

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+?)/*")

_copies: dict[Path, str] = {}  # local folder -> the URL whose copy it is
_open: "list[Mirror]" = []


def _no_objection(copy: Path) -> None:
    """The `check` of `mirrored` that goes on with whatever is there."""


def url(path: str | os.PathLike) -> str | None:
    """Returns the URL that a path is (a `Path` has lost one of its slashes), or is the local copy of; else None."""
    text = os.fspath(path)
    if match := _URL.fullmatch(text):
        return f"{match[1]}://{match[2]}"
    absolute = Path(text).absolute()
    for folder in (absolute, *absolute.parents):
        if folder in _copies:
            return "/".join((_copies[folder], *absolute.relative_to(folder).parts))
    return None


def shown(path: Path) -> str:
    """Returns what to call a path to people: its URL where it has one."""
    return url(path) or str(path)


def place(path: str | os.PathLike) -> Path:
    """Returns where a run would work on a URL, without looking for it; other paths as they are."""
    return _folder(name, "work") if _URL.fullmatch(os.fspath(path)) and (name := url(path)) else Path(path).expanduser()


def local(path: str | os.PathLike, *, without: Collection[str] = ()) -> Path:
    """Returns a local copy, for reading, of the run folder at a URL, as it is now; other paths as they are.

    Args:
        path: a URL, or a local path.
        without: names of folders that are not needed.

    Raises:
        UserError: there is no run, or no access to it.
        Outage: it cannot be reached.
    """
    if not _URL.fullmatch(os.fspath(path)):
        return Path(path).expanduser()
    name = url(path)
    for mirror in _open:
        if name == mirror.url or name.startswith(f"{mirror.url}/"):  # a member of the suite that runs here
            return mirror.folder.joinpath(*name.removeprefix(mirror.url).split("/"))
    whole, inner = _whole(name)
    folder = _folder(whole, "read")
    prefix = f"{inner}/" if inner else ""

    def wanted(path: str) -> bool:
        return path.startswith(prefix) and not set(PurePosixPath(path).parts) & set(without)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.turn(folder.parent / "lock"):
        if not pull(Bucket(whole), folder, wanted):
            raise UserError(f"there is no run at {name}")
    return folder / inner


def found(path: str) -> list[Path]:
    """Returns copies, as `local` does, of the run at a URL, or of all runs in it; `*` stands for anything in a name."""
    if not _URL.fullmatch(path):
        return [Path(path).expanduser()]
    name = url(path)
    if "*" not in name and _whole(name, there=False):
        return [local(name)]
    bucket = Bucket(name)
    names = sorted(one.removesuffix(f"/{MANIFEST}") for one in bucket.glob("" if "*" in name else "*/"))
    if not names:
        raise UserError(f"there is no run at {name}")
    return [local(one) for one in names]


@contextlib.contextmanager
def mirrored(workdir: str, check: Callable[[Path], None] | None = _no_objection) -> Iterator[Path]:
    """Yields the folder in which a run works: of a URL a local one, which is that of the `Mirror`; else the path.

    Args:
        workdir: URL or path.
        check: raises UserError where what is in a copy of the folder is not to be gone on with: before another process
            that works on the URL is told to stop. None: it is not told to, and there must be a run.
    """
    if not _URL.fullmatch(workdir):
        yield Path(workdir)
        return
    whole, inner = _whole(url(workdir))
    with Mirror(whole, check and (lambda copy: check(copy / inner))) as mirror:
        yield mirror.folder / inner


def share(workdir: Path) -> None:
    """Has all processes see the same run folder: pushes that of the first, and pulls it to the others.

    Raises:
        UserError: they do not, where it is no copy of a URL; see `hosts.same_folder`.
    """
    if hosts.count() == 1:
        return
    for mirror in _open:
        if workdir.absolute().is_relative_to(mirror.folder):
            mirror.share()
            return
    hosts.same_folder(workdir)


class Mirror:
    """A folder at a URL, and the local one where a run works: in the `with` block the first is kept like the second.

    A thread pushes now and then; the end of the block does, however it ends. What fails meanwhile is tried again.

    Attributes:
        url: of the folder.
        folder: the local one. Of several processes each has its own, and the first pushes.
    """

    def __init__(self, url: str, check: Callable[[Path], None] | None = _no_objection):
        """`check` is given a copy of what another process works on before that is told to stop; None: it never is."""
        self.url = url
        self._objects = check
        self._first = hosts.first()  # also when it has parted from the others
        self.folder = _folder(url, "work" if self._first else f"process-{hosts.index()}")
        self._bucket, self._root = Bucket(url), self.folder.parent.parent
        self._token, self._failing, self._taken = secrets.token_hex(8), False, None
        self._pushing, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)

    def __enter__(self) -> "Mirror":
        with contextlib.ExitStack() as entered:
            hosts.together("met")  # before one of them takes its time: at the first meeting the others wait a minute
            if self._first:
                self._root.mkdir(parents=True, exist_ok=True)
                entered.enter_context(storage.lock(self._root / "lock", self.url))
                shutil.rmtree(self._root / "doomed", ignore_errors=True)
                self._begin()
            self.share()
            if self._first:
                self._thread.start()
            _open.append(self)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        _open.remove(self)
        try:
            if self._first:
                self._close(error)
        finally:
            if kind is None or issubclass(kind, interrupt.Interrupted):
                # Launchers end what is left when a process has ended, and with it the push.
                hosts.together("pushed at the end")
                hosts.leave()

    def _close(self, error: BaseException | None) -> None:
        with self._entered, interrupt.deferred():  # a second signal ends it at once
            self._stop.set()
            self._thread.join()
            try:
                if self._taken:
                    raise self._taken
                self._push("uploading")
                self._bucket.write(OWNER, self._card(ended=True))
                self._bucket.delete(PENDING)
            except Exception as failure:
                self._fail(failure, error)

    def share(self) -> None:
        """Has all processes see the folder of the first."""
        if self._first:
            self._push()
        hosts.together("pushed")
        if not self._first:
            pull(self._bucket, self.folder)
        hosts.together("pulled")

    def _begin(self) -> None:
        """Becomes the owner, and has the local folder be what is there, or that and what could not be pushed then."""
        names = self._bucket.names()
        if names and not names & set(OURS):
            raise UserError(f"{self.url} holds files but no run; choose an empty folder, or a new name")
        before = self._bucket.read_json(OWNER, {})
        alive = bool(before) and not before.get("ended")
        if self._objects is None and MANIFEST not in names:
            raise UserError(f"there is no run at {self.url}")
        if self._objects is None and alive:
            raise UserError(
                f"{_named(before)} works on {self.url}, or was killed: wait until it has ended, or go on with it"
            )
        if alive:
            if MANIFEST in names:
                self._objects(local(self.url, without=["checkpoints", "trained", "frozen"]))
            say(f"{_named(before)} works on {self.url}, or was killed: it is told to stop")
        self._bucket.write(OWNER, self._card())
        text = self._bucket.read(MANIFEST).decode()
        based = self._root / "based.json"  # manifests after one of which the local folder began, or was pushed
        try:
            texts = json.loads(based.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            texts = [""]
        if not self.folder.is_dir() or text not in texts:
            incoming = self._root / "incoming" / self.folder.name
            self._make_room([*texts, text, ""], incoming)
            text = pull(self._bucket, incoming)
            self.folder.parent.mkdir(exist_ok=True)
            incoming.rename(self.folder)
            storage.write(based, json.dumps([text]))
        self._pushed = Pushed(self._bucket, self.folder, text, based, self._check)

    def _make_room(self, texts: list[str], incoming: Path) -> None:
        """Puts aside what is in the local folder and in no manifest; from all else `incoming` begins."""
        if not self.folder.is_dir():
            return
        if described(self.folder) in [plain(listed(text, self.url)) for text in texts]:
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.parent.mkdir(exist_ok=True)
            self.folder.rename(incoming)
            return
        aside = storage.move_aside(self.folder)
        say(f"{self.url} has changed since this machine pushed to it; what it could not push will be {shown(aside)}")

    def _work(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                self._push()
                if self._failing:
                    say(f"{self.url} is reached again")
                self._failing = False
            except _Taken as error:
                self._taken = error
                interrupt.note(signal.SIGTERM)  # the run stops after its step
                return
            except Exception as error:  # whatever the client of a bucket raises
                if not self._failing:
                    say(f"{one_line(error)}; the run goes on in {self.folder}, and the push is tried again")
                self._failing = True

    def _push(self, title: str | None = None) -> None:
        with self._pushing:
            for aside in sorted(self.folder.parent.iterdir()):
                if aside != self.folder and aside.is_dir():
                    bucket = Bucket(url(aside))
                    based = self._root / "based-aside.json"
                    Pushed(bucket, aside, bucket.read(MANIFEST).decode(), based, self._check).push(title)
                    # By another name: what is left of it, were this killed, would be taken for its next state.
                    doomed = self._root / "doomed" / aside.name
                    doomed.parent.mkdir(exist_ok=True)
                    aside.rename(doomed)
                    shutil.rmtree(doomed)
            self._pushed.push(title)

    def _fail(self, failure: Exception, error: BaseException | None) -> None:
        """Says why the last push has failed; raises it where nothing else ends the run."""
        what = one_line(failure)
        if not isinstance(failure, _Taken):
            what += f"; all is in {self.folder}, from where the same command on this machine goes on, and pushes it"
        if error is None or isinstance(error, interrupt.Interrupted):
            raise (type(failure) if isinstance(failure, UserError) else Outage)(what) from None
        say(what)

    def _check(self) -> None:
        """Raises _Taken where another run has become the owner."""
        card = self._bucket.read_json(OWNER, {})
        if card.get("token") == self._token:
            return
        who = f"{_named(card)} has taken over {self.url}" if card else f"{self.url} was removed meanwhile"
        raise _Taken(f"{who}: this run has stopped; what it had not pushed is in {self.folder}")

    def _card(self, ended: bool = False) -> bytes:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        card = {"token": self._token, "host": socket.gethostname(), "process": os.getpid(), "time": now}
        return json.dumps({**card, "ended": ended}).encode()


class _Taken(UserError):
    """Another run pushes to the same URL."""


def _folder(url: str, use: str) -> Path:
    """Returns the local folder of a URL for a use, below one that has a readable name, and knows it as its copy."""
    above, _, name = url.rpartition("/")
    label = f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', name)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    parent = (storage.cache_folder() / "remote" / label / use).absolute()
    _copies[parent] = above
    return parent / name


def _whole(url: str, there: bool = True) -> tuple[str, str] | None:
    """Returns the URL of the mirrored folder that holds a run, and the run's name in it: '' or that of a member.

    Where there is neither, that is (url, ''), or None where it must be there.
    """
    above, _, name = url.rpartition("/")
    if Bucket(url).read(MANIFEST):
        return url, ""
    with contextlib.suppress(UserError):  # above is the bucket
        text = Bucket(above).read(MANIFEST).decode()
        if any(path.startswith(f"{name}/") for path in listed(text, above)):
            return above, name
    return (url, "") if there else None


def _named(card: dict[str, Any]) -> str:
    return f"process {card.get('process')} on {card.get('host')}, since {card.get('time')},"
