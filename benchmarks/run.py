"""Measures jaxtl and its peers side by side: same data, weights, recipe, seeds and machine.

    python -m benchmarks.run                                      # all works, few examples: ten minutes on two cores
    python -m benchmarks.run last_block text_finetune --full --seeds 3 --out figures.json
    python -m benchmarks.run text_feature_fc --weights-bert DIR --covid DIR --precision float32 --peers torch

Every run has a process of its own, one after the other, and jaxtl starts with empty caches. With --out, all figures
are written after every run; `python -m benchmarks.table FILE` shows them again. Exit status 1 if a run failed.
benchmarks/README.md says what is measured. The peers need torch (`pip install '.[test]'`) and KerasHub.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, prepare, table
from benchmarks.works import WORKS, experiment
from jaxtl import config, storage
from jaxtl.config import Experiment
from jaxtl.errors import UserError

PRECISIONS = ("float32", "bfloat16")
PEERS = ("torch", "keras")

_ROOT = Path(__file__).resolve().parent.parent


class RunFailed(Exception):
    """A process ended with an error; the message is the last line it wrote."""


def jaxtl_figures(folder: Path, chosen: Experiment) -> dict[str, Any]:
    """Runs jaxtl with empty caches and returns its figures. `folder` is empty and the run's own.

    Raises:
        RunFailed: the run ended with an error.
    """
    storage.write(folder / prepare.EXPERIMENT, config.to_json(chosen))
    command = ["-m", "jaxtl.main", f"--experiment={folder / prepare.EXPERIMENT}", f"--workdir={folder / 'run'}"]
    _process(sys.executable, command, {"JAXTL_CACHE": str(folder / "cache")})
    result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
    same = ("accuracy", "loss", "train_loss", "trainable_parameters", "peak_memory_bytes", "device", "versions")
    times = ("seconds_train", "seconds_evaluate", "seconds_compile", "seconds_cache")
    if missing := [name for name in (*same, *times) if name not in result]:
        raise RunFailed(f"result.json has no {', '.join(missing)}")
    return {name: result[name] for name in (*same, *times)}


def peer_figures(folder: Path, chosen: Experiment, examples: Path, side: str, python: str) -> dict[str, Any]:
    """Runs a peer and returns its figures. `folder` is empty and the run's own.

    Raises:
        RunFailed: the run ended with an error.
    """
    storage.write(folder / prepare.EXPERIMENT, config.to_json(chosen))
    out = folder / "figures.json"
    _process(python, ["-m", "benchmarks.peers", side, *map(str, (folder / prepare.EXPERIMENT, examples, out))], {})
    return json.loads(out.read_text(encoding="utf-8"))


def why_not(side: str, python: str) -> str:
    """Returns why a peer cannot run with this interpreter; empty where it can."""
    module = {"torch": "torch, transformers", "keras": "keras_hub"}[side]
    try:
        _process(python, ["-c", f"import {module}"], {})
    except (RunFailed, OSError) as error:
        return f"{module} cannot be imported: {error}"
    return ""


def _process(python: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    path = os.pathsep.join(filter(None, (str(_ROOT), inherited.get("PYTHONPATH"))))
    ours = {
        "PYTHONPATH": path,
        "KERAS_BACKEND": "jax",
        "JAX_TRACEBACK_FILTERING": "off",  # or the last line of an error is a remark on that
    }
    ended = subprocess.run(
        [python, *arguments],
        env={**inherited, **ours, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if ended.returncode:
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        raise RunFailed(lines[-1] if lines else f"exit status {ended.returncode}")


def _timed(figures: dict[str, Any], chosen: Experiment, examples: int) -> dict[str, Any]:
    """Adds what follows from the times."""
    seconds = figures["seconds_train"] + figures["seconds_evaluate"]
    return {
        **figures,
        "seconds": seconds,
        "seconds_total": seconds + figures["seconds_compile"],
        "examples_per_second": examples * chosen.train.epochs / figures["seconds_train"],
    }


def compare(name: str, chosen: Experiment, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs all sides of a work and adds to `report["runs"]` what each found, or why it found nothing."""

    def add(side: str, precision: str, seed: int, **found: Any) -> None:
        report["runs"].append({"work": name, "side": side, "precision": precision, "seed": seed, **found})
        if arguments.out:  # after every run: a long comparison that is cut short has not been for nothing
            storage.write(arguments.out, json.dumps(report, indent=2) + "\n")
        outcome = found.get("error") or f"{found['seconds_total']:.1f} s, accuracy {found['accuracy']:.4f}"
        print(f"{name}, {side}, {precision}, seed {seed}: {outcome}", flush=True)

    with tempfile.TemporaryDirectory() as shared:
        shared = Path(shared)
        try:
            storage.write(shared / prepare.EXPERIMENT, config.to_json(chosen))
            _process(sys.executable, ["-m", "benchmarks.prepare", str(shared)], {})
            chosen = config.from_json((shared / prepare.EXPERIMENT).read_text(encoding="utf-8"), name)
            train_set, held_out, _ = prepare.read(shared / prepare.EXAMPLES)
        except RunFailed as error:
            add("data and weights", "-", 0, error=str(error))
            return
        report["works"][name] = {
            "title": WORKS[name].title,
            "examples": [len(train_set.labels), len(held_out.labels)],
            "epochs": chosen.train.epochs,
            "random_weights": chosen.model.weights == config.RANDOM,
        }
        for seed in range(arguments.seeds):
            for precision in arguments.precision:
                train = dataclasses.replace(chosen.train, seed=seed, precision=precision)
                this = dataclasses.replace(chosen, train=train)
                for side in ("jaxtl", *(peer for peer in arguments.peers if peer not in report["absent"])):
                    with tempfile.TemporaryDirectory() as own:
                        try:
                            if side == "jaxtl":
                                figures = jaxtl_figures(Path(own), this)
                            else:
                                python = arguments.keras_python if side == "keras" else sys.executable
                                figures = peer_figures(Path(own), this, shared / prepare.EXAMPLES, side, python)
                        except RunFailed as error:
                            add(side, precision, seed, error=str(error))
                        else:
                            add(side, precision, seed, **_timed(figures, this, len(train_set.labels)))


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(WORKS)}; none: all")
    made.add_argument("--full", action="store_true", help="all examples of the experiments instead of a few")
    made.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in jaxtl.main")
    made.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0, 1, ..")
    made.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS[:1], help="default: float32")
    made.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    for weights in ("bert", "dinov2", "vgg19"):
        made.add_argument(f"--weights-{weights}", default="", help="as model.weights; default: the experiment's")
    made.add_argument("--tfds", default="", metavar="DIR", help="tensorflow-datasets folder with cifar10")
    made.add_argument(
        "--covid", default="", metavar="DIR", help="folder with the tweets' training and validation files"
    )
    made.add_argument("--keras-python", default=sys.executable, metavar="PATH", help="interpreter that has keras-hub")
    made.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures to this file")
    return made


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs all sides; returns the exit status."""
    made = parser()
    arguments = made.parse_args(argv)
    names = arguments.name or list(WORKS)
    if unknown := [name for name in names if name not in WORKS]:
        made.error(f"there is no work {unknown[0]}; there are {', '.join(WORKS)}")
    weights = {name: getattr(arguments, f"weights_{name}") for name in ("bert", "dinov2", "vgg19")}
    data = {"tfds": arguments.tfds, "covid": arguments.covid}
    try:
        chosen = {
            name: experiment(WORKS[name], full=arguments.full, weights=weights, data=data, assignments=arguments.set)
            for name in names
        }
    except UserError as error:
        made.error(str(error))
    pythons = {"torch": sys.executable, "keras": arguments.keras_python}
    report: dict[str, Any] = {
        "processor": machine.processor(),
        "full": arguments.full,
        "set": arguments.set,
        "absent": {peer: reason for peer in arguments.peers if (reason := why_not(peer, pythons[peer]))},
        "works": {},
        "runs": [],
    }
    status = 0
    try:
        for name in names:
            compare(name, chosen[name], arguments, report)
    except KeyboardInterrupt:
        print("interrupted; what was measured before:", file=sys.stderr)
        status = 130
    table.show(report)
    return status or int(any("error" in run for run in report["runs"]))


if __name__ == "__main__":
    sys.exit(main())
