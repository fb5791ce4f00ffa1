"""Trained parameters on disk, through Orbax.

Only what was trained is saved: frozen parameters are named by `model.weights` (or by the seed, where those are
random) and read again from there. Their digest, in result.json, tells whether they are still the same.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxtl.errors import UserError

FOLDER = "checkpoints"


def save(workdir: Path, step: int, params: dict[str, Any]) -> None:
    """Saves trainable parameters by path under the step's number; the newest one is kept.

    Orbax writes to a temporary name and renames, so what is there under a number is complete.
    """
    with _manager(workdir) as manager:
        manager.save(step, args=ocp.args.StandardSave(params), force=True)
        manager.wait_until_finished()


def restore(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the newest saved trainable parameters of a run folder, by path.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no checkpoint: the run there has not finished; run it first")
    with _manager(workdir) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{workdir / FOLDER} holds no complete checkpoint; run the experiment there again")
        try:
            shapes = manager.item_metadata(step)
            target = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
            return dict(manager.restore(step, args=ocp.args.StandardRestore(target)))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            raise UserError(f"{workdir / FOLDER / str(step)} cannot be read: {error}") from None


def digest(params: Mapping[str, Any]) -> str:
    """Returns a SHA-256, in hexadecimal, of parameters by path: names, shapes and bytes."""
    sha256 = hashlib.sha256()
    for path in sorted(params):
        value = np.ascontiguousarray(params[path])
        sha256.update(f"{path} {value.shape} {value.dtype}\n".encode())
        sha256.update(value.data)
    return sha256.hexdigest()


@contextlib.contextmanager
def _manager(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    manager = ocp.CheckpointManager(
        (workdir / FOLDER).absolute(), item_handlers=ocp.StandardCheckpointHandler(), options=options
    )
    try:
        yield manager
    finally:
        manager.close()
