"""Runs an experiment in jaxtl and in a peer, side by side: same data, recipe, seeds and machine.

    python -m benchmarks.run dinov2_cifar10 --set model.weights=DIR --set data.dir=DIR [--seeds 3] [--out FILE]

Each run has a process of its own, one after the other, jaxtl and peer in turn. Prints a table and, with --out, writes
all figures as JSON. The peers need torch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtl import experiments
from jaxtl.config import Experiment, override
from jaxtl.data import sources
from jaxtl.training import run as run_folder

# experiment: the module in benchmarks.peers that trains it
_PEERS = {"dinov2_cifar10": "torch_dinov2"}


def _jaxtl(name: str, assignments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"--set={assignment}" for assignment in assignments]
        command = [sys.executable, "-m", "jaxtl.main", f"--experiment={name}", f"--workdir={folder}/run", *sets]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "run", run_folder.RESULT).read_text())


def _peer(name: str, assignments: list[str]) -> dict[str, Any]:
    """Runs this module again with --peer, so that the peer has a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        sets = [word for assignment in assignments for word in ("--set", assignment)]
        subprocess.run([sys.executable, "-m", "benchmarks.run", name, *sets, "--peer", str(out)], check=True)
        return json.loads(out.read_text())


def _train_peer(name: str, experiment: Experiment, out: Path) -> None:
    import importlib

    import torch

    module = importlib.import_module(f"benchmarks.peers.{_PEERS[name]}")
    train_set, eval_set = sources.load(experiment.data, experiment.model.image_size)
    result = module.train(experiment, train_set, eval_set, experiment.train.precision)
    out.write_text(json.dumps({**result, "versions": {"torch": torch.__version__}}))


def main() -> None:
    """Reads the command line and runs both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(_PEERS))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in jaxtl.main")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0, 1, ..")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        _train_peer(arguments.name, override(experiments.load(arguments.name), arguments.set), arguments.peer)
        return

    results: dict[str, list[dict[str, Any]]] = {"jaxtl": [], "torch": []}
    for seed in range(arguments.seeds):
        assignments = [*arguments.set, f"train.seed={seed}"]
        results["jaxtl"].append(_jaxtl(arguments.name, assignments))
        results["torch"].append(_peer(arguments.name, assignments))
        if arguments.out:  # after every pair: a long comparison that is cut short has not been for nothing
            arguments.out.write_text(
                json.dumps({"experiment": arguments.name, "set": arguments.set, **results}, indent=2)
            )

    table = Table(title=f"{arguments.name}, {arguments.seeds} seed(s): median")
    fields = ("accuracy", "loss", "train_loss", "trainable_parameters", "seconds_train", "seconds_per_epoch")
    for heading in ("", *fields):
        table.add_column(heading, justify="right")
    for side, runs in results.items():
        table.add_row(side, *(f"{statistics.median(run[field] for run in runs):,.4g}" for field in fields))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
