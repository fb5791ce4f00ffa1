"""What the commands share: flags that suggest, and errors that the user can mend in one line, exit status 2."""

import contextlib
import errno
import logging as standard_logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from absl import flags, logging

from jaxtl import hosts, interrupt
from jaxtl.errors import Outage, UserError, suggest
from jaxtl.storage import cache_folder

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


def parser(module: ModuleType) -> Callable[[list[str]], list[str]]:
    """Returns the `flags_parser` of absl's `app.run` that suggests the nearest of a module's flags."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            ours = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)]
            fail(f"there is no flag --{error.flagname}{suggest(error.flagname, ours)}; --help shows all")
        except flags.Error as error:
            fail(str(error))

    return parse


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on standard error and this exit status."""
    print(f"jaxtl: error: {' '.join(message.split())}", file=sys.stderr)
    _end(status)


def guarded(run: Callable[[list[str]], None], argv: list[str], again: str, less_memory: str | None = None) -> None:
    """Runs `run(argv)`; what the user can mend ends it with one line and status 2, what passes with status 1.

    Ctrl-C and SIGTERM end it as `jaxtl.interrupt` says, with status 130 and 143; `again` says what to do then.
    `less_memory` says what to do where memory does not suffice; None: what there is for training.
    """
    _keep_programs()
    try:
        with interrupt.handled(again):
            run(argv)
    except UserError as error:
        fail(str(error))
    except Outage as error:
        fail(str(error), status=1)
    except interrupt.Interrupted as signal:
        hosts.leave()
        interrupt.end(signal.number, again)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        fail(f"{error.filename or 'a file'} cannot be used: {error.strerror}")
    except MemoryError:
        fail(f"out of memory; {less_memory or 'lower plan.cache_budget_gb, data.train_size or train.batch_size'}")
    except Exception as error:
        if hosts.lost(error):
            reason = " ".join(str(error).split())[:200]
            fail(
                f"another process of this run has ended ({reason}); the same command on all of them goes on from the "
                "last checkpoint",
                status=1,
            )
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for out of memory
            if not hosts.joined():
                raise
            traceback.print_exc()
            _end(1)
        training = (
            "raise train.accumulate_steps, set train.remat=blocks or train.precision=bfloat16, or lower "
            "train.batch_size, train.eval_batch_size, model.image_size or data.max_length"
        )
        fail(f"out of memory on the device; {less_memory or training}")


def _end(status: int) -> NoReturn:
    """Ends this process; of several without taking leave of the others, which wait for it where they are."""
    if hosts.joined():
        sys.stdout.flush()
        sys.stderr.flush()
        hosts.say_end()
        os._exit(status)
    sys.exit(status)


def quiet_libraries() -> None:
    """Has libraries not report their stages, nor log errors that they raise as well, unless `--verbosity` is given."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)
        standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)


def _keep_programs() -> None:
    """Has JAX keep what it compiles: the same command compiles once. Read by JAX when it is imported, so before that.

    JAX's own variables are respected where they are set; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    # Of a small network every program compiles in less than JAX's second, and all of them in ten.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # with its programs and their number jaxtl has nothing to do
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # then every run compiles: nothing that a user must be told
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))
    # JAX writes a program and then when it was used (jax 0.10.2). What was killed in between would keep it from
    # writing any other.
    for program in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            used = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not used.exists() and time.time() - program.stat().st_mtime > 60:
                program.unlink()
