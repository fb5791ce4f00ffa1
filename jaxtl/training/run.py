"""The folder of one run: what is written there, and what is found there when the command is given again.

experiment.json   the resolved experiment: enough to repeat the run
environment.json  versions and hardware that it began with
metrics.jsonl     a line every few steps and at the end of every epoch, train and eval
tensorboard/      the same for TensorBoard, see `jaxtl.training.events`
checkpoints/      see `jaxtl.training.checkpoint`, as trained/ and frozen/
tokenizer/        of text: the tokenizer's files
predictions.npz   see `jaxtl.evaluation.predictions`; a table of them is in report/
report/           what people read
result.json       the figures of the finished run; written last, so that its presence means finished
lock              names the process that works in the folder, and is locked as long as that lives
"""

import contextlib
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxtl import config, hosts, remote, storage
from jaxtl.errors import UserError
from jaxtl.evaluation.figures import Figure
from jaxtl.progress import say, say_once
from jaxtl.training.events import Events

EXPERIMENT, ENVIRONMENT, METRICS, RESULT = "experiment.json", "environment.json", "metrics.jsonl", "result.json"
LOCK, REPORT, EVENTS = "lock", "report", "tensorboard"

# Settings that decide where something is kept or computed, and nothing about the result but its rounding.
WITHOUT_EFFECT = ("plan.cache_dir", "plan.cache_budget_gb", "plan.cache_disk_gb", "checkpoint.", "parallel.")
_RESULT_HAS = {
    *("accuracy", "loss", "held_out", "classes", "architecture", "frozen_sha256", "trained_sha256"),
    *("seconds_total", "versions"),
}
_PACKAGES = ("jaxtl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def finished(workdir: Path, experiment: config.Experiment, overwrite: bool) -> dict[str, Any] | None:
    """Looks at a run folder before anything is done: returns a finished run's result, None where one is to be made.

    Args:
        workdir: the folder, which need not exist.
        experiment: what is about to run there.
        overwrite: run anew even so; what is there is moved aside when the new run begins to write.

    Raises:
        UserError: the folder holds a run of another experiment, files that are no run's, or cannot be written.
    """
    weights = experiment.model.weights
    name = remote.shown(workdir)
    if weights != config.RANDOM and (weights == name or Path(weights).expanduser().resolve() == workdir.resolve()):
        raise UserError(f"a run cannot start from weights in its own folder, {name}: give another --workdir")
    path, result = workdir / EXPERIMENT, workdir / RESULT
    if path.is_file() and not overwrite:
        try:
            before = read_experiment(workdir)
            done = read_result(workdir) if result.is_file() else None
        except UserError as error:
            raise UserError(f"{name} holds a damaged run ({error}); --overwrite moves it aside") from None
        if changed := [name for name in config.differences(before, experiment) if not name.startswith(WITHOUT_EFFECT)]:
            raise UserError(
                f"{name} holds a run with other settings ({', '.join(changed)}); give another --workdir, "
                "or --overwrite to move the old run aside"
            )
        if done is not None:
            return done
    names = [entry.name for entry in workdir.iterdir()] if workdir.is_dir() else []
    if not path.is_file() and any(entry != LOCK and not entry.startswith(".") for entry in names):
        raise UserError(f"--workdir={name} holds files but no run; choose an empty folder, or a new name")
    there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"--workdir={workdir}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"--workdir={workdir}: no permission to write in {there}")
    return None


def read_experiment(folder: Path) -> config.Experiment:
    """Returns the experiment of a run, finished or not.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    path = folder / EXPERIMENT
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        inside = sorted(str(one.parent) for one in folder.glob(f"*/{EXPERIMENT}"))
        instead = f"; it holds the runs {', '.join(inside)}: name one of them" if inside else ""
        raise UserError(f"{folder} holds no run: there is no {path.name} in it{instead}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return config.from_json(text, str(path))


def read_result(folder: Path) -> dict[str, Any]:
    """Returns what result.json of a finished run holds.

    Raises:
        UserError: the run has not finished, or its result is damaged.
    """
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("it holds no figures")
        if missing := _RESULT_HAS - result.keys():
            raise ValueError(f"there is no {', '.join(sorted(missing))}")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no result: the run there has not finished; run it first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, or of another version of jaxtl: {error}") from None
    return result


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl, see `Recorder.metrics`.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = folder / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) and line.keys() >= {"step", "epoch", "split"} for line in lines):
            raise ValueError("a line of it holds no figures")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return lines


class Claim:
    """This process's right to write in a run folder. The system ends it with the process.

    Attributes:
        taken: whether this process has it. It has from the beginning where the folder holds a run then.
    """

    def __init__(self, workdir: Path):
        self.taken = False
        self._workdir, self._file = workdir.absolute(), None

    def __enter__(self) -> "Claim":
        if (self._workdir / EXPERIMENT).exists():
            self._acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def take(self, *, anew: bool = False) -> None:
        """Takes it, if it is not taken; makes the folder.

        Args:
            anew: give the run that is there another folder first, which says when.

        Raises:
            UserError: another process has it.
        """
        if anew and (self._workdir / EXPERIMENT).exists():
            if not self.taken:
                self._acquire()
            self._move_aside()
        if not self.taken:
            self._acquire()
            if hosts.first() and (self._workdir / EXPERIMENT).exists():  # the others are late to look
                raise UserError(f"another process began a run in {self._workdir} meanwhile: give another --workdir")

    def _acquire(self) -> None:
        if not hosts.first():
            self.taken = True
            return
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._workdir} cannot be made: {error.strerror or error}") from None
        self._file = storage.lock(self._workdir / LOCK, remote.shown(self._workdir))
        self.taken = True

    def _release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk kept from being written
                self._file.close()
        self.taken, self._file = False, None

    def _move_aside(self) -> None:
        if not hosts.first():
            return
        aside = storage.move_aside(self._workdir)
        say(f"the run that was in {remote.shown(self._workdir)} is now in {remote.shown(aside)}")
        self._release()  # the lock went with it
        (aside / LOCK).unlink(missing_ok=True)


class Recorder:
    """Writes the files of a run. Of several processes the first does, the others keep the lines in mind."""

    def __init__(self, workdir: Path, experiment: config.Experiment, history: str | None):
        """Begins a run in its folder, or goes on with it.

        Args:
            workdir: the folder; a run that is there and not gone on with must have been moved aside.
            experiment: what runs.
            history: of a run that goes on: metrics.jsonl as it was at the checkpoint; None: a new one begins.
        """
        self._workdir = workdir = workdir.absolute()
        self._lines, self._events = (history or "").splitlines(keepends=True), None
        self._written, self._size = len(self._lines), len(history or "")  # lines on the disk, and their bytes
        if not hosts.first():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write(workdir / EXPERIMENT, config.to_json(experiment))  # first: it makes the folder that of a run
        if history is None or not (workdir / ENVIRONMENT).exists():
            storage.write(workdir / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
        storage.write(workdir / METRICS, history or "")
        self._events = Events(workdir / EVENTS, self._lines)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._events:
            self._events.close()

    @property
    def history(self) -> str:
        """What metrics.jsonl holds, or would if it could be written."""
        return "".join(self._lines)

    def metrics(self, split: str, step: int, epoch: float, figures: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; what cannot be written now is kept, and tried again with the next.

        Args:
            split: `train` (since the last such line), `train_epoch` (the epoch so far) or `eval`.
            step: training steps done.
            epoch: passes over the training examples done, with a fraction in the middle of one.
            figures: what was measured; of figures by class, nothing is written.
        """
        single = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
        self._lines.append(json.dumps({"step": step, "epoch": round(epoch, 4), "split": split, **single}) + "\n")
        self._flush()
        if self._events:
            self._events.add(self._lines[-1], flush=split == "eval")

    def figures(self, figures: Sequence[Figure], step: int) -> None:
        """Adds the figures of the report to TensorBoard's events."""
        if self._events:
            self._events.add_figures(figures, step)

    def result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Writes result.json, and returns what it holds.

        Raises:
            UserError: it cannot be written, or lines of metrics.jsonl cannot.
        """
        self._flush()
        if not hosts.first():
            return result
        if self._written < len(self._lines):
            raise UserError(f"{self._workdir / METRICS} cannot be written: make room and give the same command again")
        storage.write(self._workdir / RESULT, json.dumps(result, indent=2) + "\n")
        return result

    def _flush(self) -> None:
        if not hosts.first():
            return
        path = self._workdir / METRICS
        lines = "".join(self._lines[self._written :]).encode()  # of which each is ASCII
        try:
            with path.open("r+b") as file:
                file.truncate(self._size)  # a full disk leaves a piece of a line
                file.seek(self._size)
                file.write(lines)
        except OSError as error:
            say_once(f"{path} cannot be written: {error.strerror or error}; its lines are kept, and tried again later")
        else:
            self._written, self._size = len(self._lines), self._size + len(lines)


def environment() -> dict[str, Any]:
    """Returns what a figure depends on beside the experiment: versions and hardware."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "platform": devices[0].platform,
        "host_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def forget_peak_memory() -> None:
    """Has `peak_memory_bytes` begin anew, where that can be: for the process, on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Returns the most memory used: of one accelerator, since the process began, or of the process on the CPU.

    Of the process on Linux it is that since `forget_peak_memory`.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but on macOS
