"""Several processes that train together, on one machine or on many: how they find each other, agree, and take turns.

All run the same program on their own part of every batch. Files are written by the first alone; every process reads
the run folder, which must be the same for all, or a copy (`jaxtl.remote`). What one of them notices (a signal, the
clock) travels to the others with the next step, so that all stop, or save, after the same one.
"""

import atexit
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxtl import progress
from jaxtl.errors import UserError

# A process that has not been heard of for so many seconds is taken for dead, and all others end.
SILENCE = 60
# So many seconds a process waits for the others at the start.
WAIT = 300

# Another program, told when this process ends by itself; where it was not told, it says what may have happened.
_witness: subprocess.Popen | None = None
_WITNESS = "import sys; sys.stdin.buffer.read(1) or print(sys.argv[1], file=sys.stderr)"


def start(*, auto: bool, coordinator: str | None, count: int | None, number: int | None) -> None:
    """Joins the others, before JAX is used for anything else; does nothing where none are asked for.

    Args:
        auto: have JAX find them by the environment of a TPU pod, of SLURM, of Kubernetes or of Open MPI.
        coordinator: HOST:PORT of the first process.
        count: of the processes.
        number: of this process, from 0.

    Raises:
        UserError: the flags do not fit together, or the others cannot be found.
    """
    given = {"--coordinator": coordinator, "--process_count": count, "--process_id": number}
    missing = [flag for flag, value in given.items() if value is None]
    if auto and len(missing) < len(given):
        raise UserError("--distributed=auto finds the other processes by itself: leave out " + ", ".join(given))
    if not auto and len(missing) == len(given):
        return
    if not auto:
        if missing:
            raise UserError(f"of several processes, each is given {', '.join(given)}; {', '.join(missing)} is missing")
        if count < 1 or not 0 <= number < count:
            raise UserError(f"--process_id={number} must be from 0 to {count - 1}, --process_count={count} at least 1")
        if not (match := re.fullmatch(r"(\S+):(\d+)", coordinator)) or not 0 < int(match[2]) < 2**16:
            raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of the first process")
        if number > 0:  # JAX, where it waits in vain, ends the process with a stack of C++
            _wait_for(match[1].strip("[]"), int(match[2]))
        elif count > 1:
            progress.say(f"waiting for the other {count - 1} at {coordinator}, {WAIT} s at most")
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from jaxtl.interrupt
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            initialization_timeout=WAIT,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = "" if auto else f" at {coordinator}"
        told = " ".join(str(error).split())[:300]
        raise UserError(f"the other processes were not found{where}: {told}") from None
    _call_witness()
    if jax.process_index() > 0:
        progress.mute()


def _call_witness() -> None:
    """JAX aborts a process that hears of another's end while it is not waiting for it: it cannot say a line then."""
    global _witness
    line = (
        "jaxtl: error: this process was aborted or killed, most likely because another process of this run has ended "
        "(see what that one printed last); the same command on all of them goes on from the last checkpoint"
    )
    _witness = subprocess.Popen(
        [sys.executable, "-ISc", _WITNESS, line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    atexit.register(say_end)


def say_end() -> None:
    """Tells the witness, if there is one, that this process ends by itself."""
    if _witness:
        with contextlib.suppress(OSError):  # it was killed
            os.write(_witness.stdin.fileno(), b".")


def _wait_for(host: str, port: int) -> None:
    """Waits until something listens there; raises UserError after `WAIT` seconds."""
    until = time.monotonic() + WAIT
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--coordinator={host}:{port}: no process listens there ({error.strerror or error}); start the "
                    "first one, --process_id=0, with the same --coordinator"
                ) from None
        time.sleep(0.5)


def joined() -> bool:
    """Whether this process has joined others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def count() -> int:
    """Returns the number of processes; of one alone without JAX, which would take the accelerator."""
    if not joined():
        return 1
    import jax

    return jax.process_count()


def index() -> int:
    """Returns the number of this process, from 0."""
    if not joined():
        return 0
    import jax

    return jax.process_index()


def first() -> bool:
    """Whether this process is the one that writes and talks."""
    return index() == 0


def together(name: str) -> None:
    """Waits until all processes have come to the point of this name."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def all_say(flags: list[bool]) -> list[bool]:
    """Returns, of each flag, whether it is set in every process."""
    if count() == 1:
        return flags
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(flags)).all(axis=0).tolist()


def gather(figures: list[float]) -> list[list[float]]:
    """Returns, of each figure, that of every process."""
    if count() == 1:
        return [[figure] for figure in figures]
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(figures)).T.tolist()


def same_folder(workdir: Path) -> None:
    """Raises UserError where the processes do not see the same run folder, by a file that the first one writes."""
    if count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    mark = workdir.absolute().parent / f".{workdir.name}.processes"
    token = np.frombuffer(os.urandom(8), np.int32)
    token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    if first():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(token.tobytes().hex())
    together("marked")
    seen = mark.is_file() and mark.read_text() == token.tobytes().hex()
    (everywhere,) = all_say([seen])
    if first():
        mark.unlink(missing_ok=True)
    if not everywhere:
        raise UserError(f"--workdir={workdir} is not the same folder for all {count()} processes: name a shared one")


def leave() -> None:
    """Parts from the others in order, so that none takes this process's end for a failure."""
    if joined():
        import jax

        jax.distributed.shutdown()


def lost(error: Exception) -> bool:
    """Whether an error of JAX says that another process, or the way to it, is gone."""
    if not joined():
        return False
    text = str(error).lower()
    signs = ("gloo", "connection", "coordination", "heartbeat", "socket", "unavailable", "deadline", "preempted")
    return any(sign in text for sign in signs)
