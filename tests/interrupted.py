"""A small run that is interrupted, killed and gone on with, and what of its lines must be the same afterwards."""

import json
import os
import random
import socket
from pathlib import Path

from jaxtl import config
from jaxtl.training import freeze

IMAGES = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=32, dropout=0.5)),
    data=config.Images(source="digits", train_size=96, eval_size=48),
    freeze=freeze.train_from("block_3"),
    optim=config.Optim("adamw", learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
    train=config.Train(epochs=3, batch_size=32, eval_batch_size=16, log_every=1, select="best"),
    checkpoint=config.Checkpoint(every_steps=2),
)
_TIMES = ("seconds", "examples_per_second")


def free_port() -> int:
    """Returns a port for a process that binds it some seconds later: none that the system gives out meanwhile."""
    for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 100):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def lines(folder: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in found]
