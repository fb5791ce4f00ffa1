"""What is shown while work goes on: a bar on a terminal, plain lines elsewhere. All on standard error."""

import functools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_LINE_EVERY = 10.0  # seconds between plain lines
_muted = False


def mute() -> None:
    """Has this process show nothing from here on: another one does."""
    global _muted
    _muted = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def say(text: str) -> None:
    """Prints a line for the person watching; of several processes only the first does, see `jaxtl.hosts`."""
    if _muted:
        return
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)


@functools.cache
def say_once(text: str) -> None:
    """`say`, the first time that this is said: a suite looks at its data once for every member."""
    say(text)


class Bar:
    """Progress of one long piece of work: `advance` as it goes on, inside a `with` block.

    On a terminal a bar with count and time left; elsewhere a line every ten seconds.
    """

    def __init__(self, description: str, total: int | None, done: int = 0):
        """`done` of `total` were done before: time left is that of the rest, at the speed from here on.

        Where nobody knows how many there are, `total` is None, and the time left is not shown.
        """
        self._description, self._total, self._before = description, total, done
        self._done, self._note, self._last = done, "", time.monotonic()
        self._start = self._last
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not _muted:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),  # the figures need the width of a terminal
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                *(() if total is None else (TimeRemainingColumn(compact=True), TextColumn("left"))),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> "Bar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Counts `count` more as done, and shows `note` (loss, speed) beside the bar."""
        self._done += count
        self._note = self._note if note is None else note
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=self._note)
            return
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY:
            self._last = now
            if self._total is None:
                say(f"{self._description} {self._done} {self._note}")
                return
            left = (now - self._start) / (self._done - self._before) * (self._total - self._done)
            say(f"{self._description} {self._done}/{self._total} {self._note} {_duration(left)} left")


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yields the items, showing how many have been taken."""
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
