"""One run of one peer, in a process of its own.

python -m benchmarks.peers SIDE EXPERIMENT.json EXAMPLES.npz OUT.json
"""

import importlib
import json
import sys
from pathlib import Path

from benchmarks import machine, prepare
from benchmarks.peers import recipe
from jaxtl import config


def main(side: str, experiment_file: str, examples: str, out: str) -> None:
    """Trains and evaluates; writes the figures.

    Raises:
        ValueError: the experiment asks for what the peer does not do.
    """
    experiment = config.from_json(Path(experiment_file).read_text(encoding="utf-8"), experiment_file)
    family = recipe.family(experiment)
    train_set, eval_set, classes = prepare.read(Path(examples))
    loop = importlib.import_module(f"benchmarks.peers.{side}_loop")
    loop.configure(experiment)
    model = importlib.import_module(f"benchmarks.peers.{side}_{family}").build(experiment, classes)
    found = loop.train(model, experiment, train_set, eval_set)
    found = {**found, "peak_memory_bytes": machine.peak_memory_bytes(), **loop.environment()}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
