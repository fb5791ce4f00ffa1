"""The folder of one run: what is written there, and what is found there when the command is given again.

experiment.json   the resolved experiment: enough to repeat the run
metrics.jsonl     a line every few steps and at the end of every epoch, train and eval
checkpoints/      trained parameters
result.json       the figures of the finished run; written last, so that its presence means finished
"""

import datetime
import json
import os
import platform
import resource
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxtl import config
from jaxtl.errors import UserError
from jaxtl.training import checkpoint

EXPERIMENT, METRICS, RESULT = "experiment.json", "metrics.jsonl", "result.json"

_PACKAGES = ("jaxtl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def finished(workdir: Path, experiment: config.Experiment, overwrite: bool) -> dict[str, Any] | None:
    """Looks at a run folder before anything is done: returns the result of a finished run, None where there is none.

    Args:
        workdir: the folder, which need not exist.
        experiment: what is about to run there.
        overwrite: move what is there aside, under a name that says when, and start anew.

    Raises:
        UserError: the folder holds a run of another experiment, or files that are no run's.
    """
    parent = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--workdir={workdir}: no permission to write in {parent}")
    if not workdir.exists():
        return None
    if overwrite:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        workdir.rename(workdir.with_name(f"{workdir.name}.{stamp}"))
        return None
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is not a folder")
    path = workdir / EXPERIMENT
    if not path.is_file():
        if any(workdir.iterdir()):
            raise UserError(f"--workdir={workdir} holds files but no run; choose an empty folder, or a new name")
        return None
    before = config.from_json(path.read_text(encoding="utf-8"), str(path))
    if changed := config.differences(before, experiment):
        raise UserError(
            f"{workdir} holds a run with other settings ({', '.join(changed)}); give another --workdir, "
            "or --overwrite to move the old run aside"
        )
    result = workdir / RESULT
    return json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None


class Figures(Protocol):
    """Means over examples."""

    loss: float
    accuracy: float
    examples_per_second: float


class Recorder:
    """Writes the files of a run. Creating it begins the run anew in its folder."""

    def __init__(self, workdir: Path, experiment: config.Experiment):
        workdir.mkdir(parents=True, exist_ok=True)
        # What a run left that was cut off between its checkpoint and its result.
        shutil.rmtree(workdir / checkpoint.FOLDER, ignore_errors=True)
        self._workdir = workdir
        _write(workdir / EXPERIMENT, config.to_json(experiment))
        self._metrics = (workdir / METRICS).open("w", encoding="utf-8")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def metrics(self, split: str, step: int, epoch: float, figures: Figures) -> None:
        """Adds a line to metrics.jsonl.

        Args:
            split: `train` (since the last such line), `train_epoch` (the epoch so far) or `eval`.
            step: training steps done.
            epoch: passes over the training examples done, with a fraction in the middle of one.
            figures: what was measured.
        """
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "split": split,
            "loss": figures.loss,
            "accuracy": figures.accuracy,
            "examples_per_second": round(figures.examples_per_second, 2),
        }
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def result(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Writes result.json, with versions and hardware added, and returns what it holds."""
        result = {**figures, **environment()}
        _write(self._workdir / RESULT, json.dumps(result, indent=2) + "\n")
        return result


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


def peak_memory_bytes() -> int:
    """Returns the most memory used so far: of one accelerator, or on the CPU of the process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but on macOS


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")  # renamed when complete: a killed run leaves no half of it
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
