"""Ctrl-C and SIGTERM: noticed at once, and obeyed at a point where nothing is lost by it.

A thread hears of a signal even while the main thread is inside XLA, compiling. Outside of `deferred` it ends the
process there and then: whatever is being written has a temporary name. Within, it leaves a note that the loop reads
between two steps; a second signal ends the process at once.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from jaxtl import hosts

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_lock = threading.Lock()
_deferrals = 0
_asked: int | None = None


class Interrupted(BaseException):
    """A signal asked the process to end, and this is a point where it can."""

    def __init__(self, number: int):
        super().__init__(name(number))
        self.number = number


def name(number: int) -> str:
    """Returns what a signal is called."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def handled(again: str) -> Iterator[None]:
    """Within it the signals are handled as the module says. In another thread than the main one it does nothing.

    `again` is shown to who ends the process: how to go on.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    # Python writes a signal's number to the socket the moment that it arrives; its own handlers run in the main thread
    # alone, and only between two instructions of Python.
    descriptor = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    listener = threading.Thread(target=_listen, args=(ours, again), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        pythons.close()  # ends the listener
        listener.join()
        ours.close()
        _asked = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it a first signal is only noted: `asked` and `check` tell. It is raised at the end at the latest."""
    global _deferrals
    with _lock:
        _deferrals += 1
    try:
        yield
        check()
    finally:
        with _lock:
            _deferrals -= 1


def asked() -> bool:
    """Whether a signal has been noted."""
    return _asked is not None


def note(number: int) -> None:
    """Has it be as though the signal had come here, where none has yet: another process was asked to end."""
    global _asked
    with _lock:
        _asked = number if _asked is None else _asked


def check() -> None:
    """Raises Interrupted where a signal has been noted."""
    if _asked is not None:
        raise Interrupted(_asked)


def end(number: int, again: str) -> None:
    """Ends the process now, with a line on standard error and the exit status that a shell gives to the signal.

    Not by `sys.exit`: threads of grain and XLA at work when the interpreter is taken down end it with a fault.
    """
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    _tell(f"{show_cursor}\njaxtl: stopped by {name(number)}; {again}")
    hosts.say_end()
    os._exit(128 + number)


def _listen(source: socket.socket, again: str) -> None:
    while numbers := source.recv(16):
        for number in numbers:
            if number in SIGNALS:
                _received(number, again)


def _received(number: int, again: str) -> None:
    global _asked
    with _lock:
        first = _deferrals > 0 and _asked is None
        if first:
            _asked = number
    if not first:
        end(number, again)
    _tell(f"\njaxtl: {name(number)}: stopping as soon as the state is saved; once more to stop at once")


def _tell(line: str) -> None:
    """Prints a line, and goes on without that after a second: a terminal that is stopped (Ctrl-S) takes none."""

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            sys.stdout.flush()
            print(line, file=sys.stderr, flush=True)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(1.0)
