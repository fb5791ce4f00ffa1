"""What a run saves, through Orbax: its state in mid-run, and what it trained at the end.

checkpoints/STEP/  trainable parameters, the optimiser's state, those parameters that did best so far, and a record of
                   all the rest that the run needs to go on as though it had never stopped
trained/           the trainable parameters that are the run's result
frozen/            with `checkpoint.save_frozen`: the others

Orbax writes under a temporary name and renames, so that what is there under its own name is complete. Damage that comes
later shows in digests of what was saved: those of a checkpoint are in its record, the other two in result.json.

Frozen parameters are otherwise named by `model.weights` (or by the seed, where those are random) and read again from
there; their digest tells whether they are still the same.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxtl import config, hosts
from jaxtl.errors import UserError
from jaxtl.models import stages
from jaxtl.progress import say
from jaxtl.training.step import TrainState

FOLDER, TRAINED, FROZEN = "checkpoints", "trained", "frozen"
DAMAGED = "damaged"  # where damaged checkpoints are put

_RECORD = "record"
# Reasons for which a file cannot be read that say nothing about what is in it.
_PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint, read.

    Attributes:
        step: training steps done.
        params: trainable parameters by path.
        kept: those that did best so far, where they are not `params`.
        record: what `Saver.save` was given.
    """

    step: int
    params: dict[str, np.ndarray]
    kept: dict[str, np.ndarray] | None
    record: dict[str, Any]
    _optimizer: dict[str, np.ndarray]

    def state(self, like: TrainState) -> TrainState:
        """Returns the training state, on the host, shaped like another.

        Raises:
            UserError: parameters or optimiser state are of another shape.
        """
        wanted = {**_by_path(like.params), **{f"optimizer/{path}": x for path, x in _by_path(like.opt_state).items()}}
        found = {**self.params, **{f"optimizer/{path}": x for path, x in self._optimizer.items()}}
        if {path: (x.shape, x.dtype) for path, x in wanted.items()} != {
            p: (x.shape, x.dtype) for p, x in found.items()
        }:
            raise UserError(
                f"the checkpoint of step {self.step} is of another model or optimiser than this version of jaxtl makes "
                "of these settings: go on with the version that began, or --overwrite to start anew"
            )
        opt_state = jax.tree_util.tree_map_with_path(lambda path, _: self._optimizer[_name(path)], like.opt_state)
        return TrainState(np.int32(self.step), self.params, opt_state)


class Saver:
    """Saves a run's state as it goes on: in the background, whole or not at all.

    What cannot be saved in mid-run is said, and training goes on.
    """

    def __init__(self, workdir: Path, settings: config.Checkpoint, latest: int | None):
        """`latest` is the step of the checkpoint that the run goes on from. Of several processes, the first writes."""
        self.latest = latest
        self._folder, self._settings = (workdir / FOLDER).absolute(), settings
        self._pending: int | None = None
        self._saved_at = time.monotonic()
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be saved, by its number."""
        every = self._settings.every_steps
        return bool(every) and step % every == 0 and step not in (self.latest, self._pending)

    def overdue(self, step: int) -> bool:
        """Whether it is by the clock, which is another one for every process."""
        minutes = self._settings.every_minutes
        late = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        return late and step not in (self.latest, self._pending)

    def save(self, state: TrainState, kept: stages.Params | None, record: Mapping[str, Any]) -> None:
        """Begins to save the state, unless the checkpoint of its step is there already.

        Args:
            state: on the host, a copy.
            kept: see `Saved`.
            record: plain data, for JSON.
        """
        step = int(state.step)
        self.wait()
        if step == self.latest:
            return
        self._saved_at = time.monotonic()
        if not hosts.first():
            self.latest = step
            return
        items = {"params": state.params, "optimizer": _by_path(state.opt_state)}
        if kept is not None:
            items["kept"] = kept
        described = {
            "step": step,
            "arrays": {
                name: {path: [x.shape, x.dtype.name] for path, x in arrays.items()} for name, arrays in items.items()
            },
            "sha256": {name: digest(arrays) for name, arrays in items.items()},
            **record,
        }
        text = json.dumps(described)
        args = {name: ocp.args.StandardSave(arrays) for name, arrays in items.items()}
        # As text: what is read is what was written to the last character, which its digest can tell.
        args[_RECORD] = ocp.args.JsonSave({"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        try:
            if self._manager is None:
                self._folder.mkdir(exist_ok=True)
                self._manager = ocp.CheckpointManager(self._folder, options=self._options())
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
            self._pending = step
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk
            self._failed(step, error)

    def wait(self) -> None:
        """Waits until what was begun is on the disk, or has failed, which is said."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            self.latest = step
        except Exception as error:
            self._failed(step, error)

    def _options(self) -> ocp.CheckpointManagerOptions:
        return ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._settings.keep),
            cleanup_tmp_directories=True,
            multiprocessing_options=_alone(),
            create=False,
        )

    def _failed(self, step: int, error: Exception) -> None:
        last = "there is none before it" if self.latest is None else f"the last one is that of step {self.latest}"
        say(f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED in {self._folder}: {one_line(error)}; {last}")
        # A manager whose background thread has failed reports that again and again.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = None
        with contextlib.suppress(OSError):
            for leftover in self._folder.iterdir():
                if not leftover.name.isdigit():
                    shutil.rmtree(leftover, ignore_errors=True)


def load(workdir: Path) -> Saved | None:
    """Returns the newest sound checkpoint of a run folder; None where none was ever saved, which is said.

    Damaged ones that are newer are put aside, and said.

    Raises:
        UserError: all are damaged, or gone, or the system does not let them be read.
    """
    steps = _steps(workdir / FOLDER)
    damaged: list[tuple[int, str]] = []
    for step in steps:
        try:
            saved = _read(workdir / FOLDER / str(step))
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            if reason := _system_reason(error, *_PASSING):
                raise UserError(
                    f"{workdir / FOLDER / str(step)} cannot be read: {reason}; nothing was changed"
                ) from None
            damaged.append((step, one_line(error)))
            continue
        for bad, reason in damaged:
            aside = workdir / DAMAGED / f"{bad}.{time.strftime('%Y%m%d-%H%M%S')}"
            hosts.together(f"read {bad}")  # by all
            if hosts.first():
                aside.parent.mkdir(exist_ok=True)
                (workdir / FOLDER / str(bad)).rename(aside)
            say(
                f"THE CHECKPOINT OF STEP {bad} IS DAMAGED ({reason}): it is now {aside}; the run goes on from the one "
                f"before, of step {step}"
            )
        return saved
    if damaged:
        listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
        raise UserError(
            f"all checkpoints in {workdir / FOLDER} are damaged ({listed}): put back a copy, or --overwrite moves the "
            "run aside and starts anew"
        )
    if (workdir / TRAINED).exists():
        raise UserError(f"{workdir} holds trained parameters and no checkpoint: put {FOLDER} back, or --overwrite")
    say(f"the run in {workdir} was interrupted before its first checkpoint: it starts from step 0")
    return None


def write(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes parameters by path, whole or not at all.

    Raises:
        UserError: that cannot be done.
    """
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(folder.absolute(), _host(params), force=True)
            checkpointer.wait_until_finished()
    except Exception as error:
        raise UserError(
            f"{folder} cannot be written: {one_line(error)}; the same command goes on from the last checkpoint"
        ) from None


def read(folder: Path, sha256: str) -> dict[str, np.ndarray]:
    """Returns what `write` wrote.

    Args:
        folder: where.
        sha256: what `digest` said then.

    Raises:
        UserError: it is not there, or cannot be read, or is no longer what was written.
    """
    if not folder.is_dir():
        raise UserError(f"there is no {folder}: the run there has not finished, or was not copied whole; run it first")
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            described = checkpointer.metadata(folder.absolute())
            tree = getattr(described, "item_metadata", described)
            shapes = dict(getattr(tree, "tree", tree))
            target = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
            params = dict(checkpointer.restore(folder.absolute(), target))
    except Exception as error:
        raise UserError(f"{folder} is damaged: {one_line(error)}; run the experiment again with --overwrite") from None
    if digest(params) != sha256:
        raise UserError(
            f"{folder} is damaged: its parameters are not those that were written; run the experiment again with "
            "--overwrite"
        )
    return params


def digest(params: Mapping[str, Any], read: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """Returns a SHA-256, in hexadecimal, of parameters by path: names, shapes and bytes; `read` reads one of them."""
    sha256 = hashlib.sha256()
    for path in sorted(params):
        value = read(params[path])
        sha256.update(f"{path} {value.shape} {value.dtype}\n".encode())
        sha256.update(np.ascontiguousarray(value).data)
    return sha256.hexdigest()


def one_line(error: Exception) -> str:
    """Returns what an error says in one line: the system's reason where there is one, else at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if reason := _system_reason(error, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *_PASSING):
        return reason
    return text if len(text) <= 300 else f"{text[:300]} .."


def _system_reason(error: Exception, *numbers: int) -> str:
    """Returns which of these the system has said, of files, or ''. TensorStore writes it between paths and places."""
    if isinstance(error, OSError) and error.errno in numbers:
        return os.strerror(error.errno)
    return next((os.strerror(number) for number in numbers if os.strerror(number) in str(error)), "")


def _steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, newest first. What has a temporary name is none."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)


def _read(folder: Path) -> Saved:
    """Reads one checkpoint; raises whatever shows that it is damaged."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:

        def restore(**args: Any) -> Any:
            return checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**args))

        envelope = restore(**{_RECORD: ocp.args.JsonRestore()})[_RECORD]
        text = envelope["text"]
        if hashlib.sha256(text.encode()).hexdigest() != envelope["sha256"]:
            raise ValueError("its record is not what was written, by its SHA-256")
        record = json.loads(text)
        targets = {
            name: {path: np.empty(shape, dtype) for path, (shape, dtype) in arrays.items()}
            for name, arrays in record["arrays"].items()
        }
        found = restore(**{name: ocp.args.StandardRestore(target) for name, target in targets.items()})
    items = {name: dict(found[name]) for name in targets}
    for name, arrays in items.items():
        if digest(arrays) != record["sha256"][name]:
            raise ValueError(f"{name} is not what was written, by its SHA-256")
    if record["step"] != int(folder.name):
        raise ValueError(f"it is that of step {record['step']}")
    return Saved(record["step"], items["params"], items.get("kept"), record, items["optimizer"])


def _alone() -> ocp.options.MultiprocessingOptions:
    """What has Orbax not wait for other processes: the first writes, and each reads for itself."""
    if hosts.count() == 1:
        return ocp.options.MultiprocessingOptions()
    number = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"process_{number}"
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in arrays.items()}
