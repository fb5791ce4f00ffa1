"""What the commands share: flags that suggest, and errors that the user can mend in one line, exit status 2."""

import errno
import os
import sys
from collections.abc import Callable
from types import ModuleType

from absl import flags

from jaxtl.errors import UserError, suggest
from jaxtl.storage import cache_folder

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


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


def fail(message: str) -> None:
    """Ends the program with one line on standard error and exit status 2."""
    print(f"jaxtl: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def guarded(run: Callable[[list[str]], None], argv: list[str], interrupted: str) -> None:
    """Runs `run(argv)`; what the user can mend ends it with one line, Ctrl-C with `interrupted` and status 130."""
    _keep_programs()
    try:
        run(argv)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"\njaxtl: interrupted; {interrupted}", file=sys.stderr, flush=True)
        # Not sys.exit: threads of grain and XLA at work when the interpreter is taken down end it with a fault.
        os._exit(130)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    except MemoryError:
        fail("out of memory; lower plan.cache_budget_gb, data.train_size or train.batch_size")
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for out of memory
            raise
        fail(
            "out of memory on the device; raise train.accumulate_steps, set train.remat=blocks or "
            "train.precision=bfloat16, or lower train.batch_size, train.eval_batch_size, model.image_size or "
            "data.max_length"
        )


def _keep_programs() -> None:
    """Has JAX keep what it compiles: the same command compiles once. Read by JAX when it is imported, so before that.

    JAX's own variables are respected where they are set; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # then every run compiles: nothing that a user must be told
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))
