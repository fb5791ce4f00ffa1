"""One process, or several on as many hosts: what the launchers' flags say, checked before JAX is used for anything.

One process trains with all devices that it sees, on a TPU slice of one host too. Several are not supported yet.
"""

import re

from jaxtl.errors import UserError

_SEVERAL = (
    "training in several processes is not supported yet: take a machine, or a TPU slice, of one host, of which all "
    "devices are used"
)


def start(*, auto: bool, coordinator: str | None, count: int | None, number: int | None) -> None:
    """Has JAX know of other processes; does nothing where none are asked for.

    Args:
        auto: have JAX find them by the environment of a TPU slice, of SLURM or of Open MPI.
        coordinator: HOST:PORT of the first process.
        count: of the processes.
        number: of this process, from 0.

    Raises:
        UserError: the flags do not fit together, the others cannot be found, or there are any.
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
        if not re.fullmatch(r"\S+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of the first process")
        if count > 1:
            raise UserError(_SEVERAL)
    import jax

    try:
        jax.distributed.initialize(coordinator, count, number)
    except (RuntimeError, ValueError, OSError) as error:
        where = " by the environment" if auto else f" at {coordinator}"
        told = " ".join(str(error).split())[:300]
        raise UserError(f"the other processes were not found{where}: {told}") from None
    if jax.process_count() > 1:
        raise UserError(_SEVERAL)
