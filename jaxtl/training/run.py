"""The folder of one run: what is written there, and what is found there when the command is given again.

experiment.json   the resolved experiment: enough to repeat the run
metrics.jsonl     a line every few steps and at the end of every epoch, train and eval
checkpoints/      trained parameters
tokenizer/        of text: the tokenizer's files
misclassified.csv the examples that the model got wrong, most confident errors first
result.json       the figures of the finished run; written last, so that its presence means finished
"""

import datetime
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxtl import config, storage
from jaxtl.errors import UserError
from jaxtl.training import checkpoint

EXPERIMENT, METRICS, RESULT = "experiment.json", "metrics.jsonl", "result.json"

# Settings that decide where something is kept, and nothing about the result.
_WITHOUT_EFFECT = ("plan.cache_dir", "plan.cache_budget_gb", "plan.cache_disk_gb")
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
    if weights != config.RANDOM and Path(weights).expanduser().resolve() == workdir.resolve():
        raise UserError(f"a run cannot start from weights in its own folder, {workdir}: give another --workdir")
    path, result = workdir / EXPERIMENT, workdir / RESULT
    if path.is_file() and result.is_file() and not overwrite:
        try:
            before = config.from_json(path.read_text(encoding="utf-8"), str(path))
            done = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{workdir} holds a damaged run ({error}); --overwrite moves it aside") from None
        if changed := [name for name in config.differences(before, experiment) if name not in _WITHOUT_EFFECT]:
            raise UserError(
                f"{workdir} holds a run with other settings ({', '.join(changed)}); give another --workdir, "
                "or --overwrite to move the old run aside"
            )
        return done
    if workdir.is_dir() and not path.is_file() and any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir} holds files but no run; choose an empty folder, or a new name")
    there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"--workdir={workdir}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"--workdir={workdir}: no permission to write in {there}")
    return None


class Recorder:
    """Writes the files of a run.

    Creating it begins the run anew in its folder: a finished run there is moved aside, under a name that says when;
    what a run left that never finished is written over.
    """

    def __init__(self, workdir: Path, experiment: config.Experiment):
        workdir = workdir.absolute()
        if (workdir / RESULT).exists():
            workdir.rename(workdir.with_name(f"{workdir.name}.{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"))
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(workdir / checkpoint.FOLDER, ignore_errors=True)
        self._workdir = workdir
        storage.write(workdir / EXPERIMENT, config.to_json(experiment))
        self._metrics = (workdir / METRICS).open("w", encoding="utf-8")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def metrics(self, split: str, step: int, epoch: float, figures: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl.

        Args:
            split: `train` (since the last such line), `train_epoch` (the epoch so far) or `eval`.
            step: training steps done.
            epoch: passes over the training examples done, with a fraction in the middle of one.
            figures: what was measured; of figures by class, nothing is written.
        """
        single = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
        self._metrics.write(json.dumps({"step": step, "epoch": round(epoch, 4), "split": split, **single}) + "\n")
        self._metrics.flush()

    def result(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Writes result.json, with versions and hardware added, and returns what it holds."""
        result = {**figures, **environment()}
        storage.write(self._workdir / RESULT, json.dumps(result, indent=2) + "\n")
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
