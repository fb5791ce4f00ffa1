"""The real command, killed at every kind of moment of its life: what it ends with is what it would have ended with."""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtl import config
from jaxtl.training import checkpoint, freeze
from jaxtl.training.network import load_run

FAULTS = Path(__file__).parent.parent / "faults.py"
sys.path.append(str(FAULTS.parent))  # for the processes too, which inherit it
faults = importlib.import_module("faults")

# Every process is a copy of one that has loaded the libraries and done nothing with them: half of its life otherwise.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["jaxtl.training.suite", "jaxtl.training.explain", "faults"])

TIMES = ("seconds", "examples_per_second", "peak_memory_bytes", "cache")

IMAGES = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=32, dropout=0.5)),
    data=config.Images(source="digits", train_size=100, eval_size=50),
    freeze=freeze.train_from("block_3"),
    optim=config.Optim("adamw", learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0, schedule="cosine"),
    train=config.Train(epochs=4, batch_size=32, eval_batch_size=32, log_every=3, select="best"),
    checkpoint=config.Checkpoint(every_steps=1),
)

START = (
    "SIGKILL@0.5",  # imports
    "SIGTERM@2.0",
    "SIGKILL@jaxtl.training.setup:describe#1",
    "SIGTERM@jaxtl.training.loop:initial_params#1",
    "SIGKILL@jaxtl.training.cache:_Prefix.__call__#2",  # while the cache is filled
    "SIGTERM@jaxtl.training.cache:_Prefix.__call__#3",
    "SIGKILL@jaxtl.training.store:Incomplete.keep#1",
    "SIGKILL@jaxtl.training.loop:compile_step#1",
    "SIGTERM@jaxtl.training.evaluate:compile_step#1",
    "SIGKILL@jaxtl.training.run:Recorder.__init__#1",
    "SIGTERM@jaxtl.training.run:Recorder.__init__#1+",
)
# Each goes on from what the one before has left, and does a step or two.
GOING = (
    "SIGKILL@jaxtl.training.loop:_Loop._report#1",
    "SIGKILL@jaxtl.training.loop:_Loop._report#2",
    "SIGTERM@jaxtl.training.loop:_Loop._report#1",
    "SIGKILL@jaxtl.training.checkpoint:Saver.save#1",  # before, while and after the state is written
    "SIGKILL@jaxtl.training.checkpoint:Saver.save#1+",
    "SIGKILL@os:rename#1",
    "SIGKILL@jaxtl.training.checkpoint:Saver.wait#2+",
    "SIGTERM@jaxtl.training.checkpoint:Saver.save#1",
    "SIGTERM,SIGTERM@jaxtl.training.checkpoint:Saver.save#1",
    "SIGINT@jaxtl.training.loop:_Loop._sent#1",
    "SIGKILL@jaxtl.training.loop:_Loop._evaluate#1",
    "SIGTERM@jaxtl.training.loop:_Loop._evaluate#1",
    "SIGKILL@jaxtl.training.standing:Standing.close_epoch#1",
)
END = (
    "SIGKILL@jaxtl.training.loop:_Loop.finish#1",
    "SIGKILL@jaxtl.training.checkpoint:write#1+",
    "SIGKILL@jaxtl.training.run:Recorder.result#1",
    "SIGTERM@jaxtl.training.checkpoint:write#1",  # which is then finished
)
STATUS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}


def command(experiment: Path, workdir: Path, cache: Path, moment: str = "SIGKILL@"):
    """Gives the command, with a signal at a moment; returns exit status and what was written."""
    arguments = [f"--experiment={experiment}", f"--workdir={workdir}"]
    environment = {"JAXTL_CACHE": str(cache), "JAXTL_TEST_REPORT": "False"}
    if moment.partition("@")[2][:1].isdigit():
        ended = subprocess.run(
            [sys.executable, FAULTS, moment, *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return ended.returncode, ended.stderr
    output = workdir.parent / "output"
    process = FORKS.Process(target=faults.warm, args=(moment, arguments, environment, str(output)))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    return process.exitcode, output.read_text()


def outcome(folder: Path):
    """Returns all that a run ends with but times: parameters, optimiser state and what it kept, figures, every line."""
    saved = checkpoint.load(folder)
    finished = load_run(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "sha256": [saved.record["sha256"][item] for item in ("params", "optimizer")],
        "step": saved.step,
        "batches": saved.record["batches"],
        "trained": checkpoint.digest(finished.trained),
        "result": {name: value for name, value in finished.result.items() if not name.startswith(TIMES)},
        "lines": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "predictions": (folder / "predictions.npz").read_bytes(),
        "table": (folder / "report" / "predictions.csv").read_text(),
    }


@pytest.fixture(scope="module", params=["images", "texts"])
def whole(request, tmp_path_factory, bert_folder, text_folder):
    """An experiment's file, a folder of caches, and what the experiment ends with when nothing interrupts it."""
    folder = tmp_path_factory.mktemp(request.param)
    experiment = IMAGES
    if request.param == "texts":
        experiment = config.Experiment(
            model=config.Model(
                "from_weights", str(bert_folder), head=config.Head("bigru", "sequence", 16, dropout=0.3)
            ),
            data=config.Text(
                dir=str(text_folder),
                train=("train.csv",),
                validation="val.csv",
                test="test.csv",
                max_length=40,
                buckets=2,
                train_size=90,
            ),
            freeze=freeze.train_from("layer_2"),
            optim=config.Optim("adamw", learning_rate=3e-3, weight_decay=0.1, clip_norm=1.0),
            train=config.Train(epochs=4, batch_size=32, eval_batch_size=32, log_every=2),
            checkpoint=config.Checkpoint(every_steps=1),
        )
    path = folder / "experiment.json"
    path.write_text(config.to_json(experiment))
    status, output = command(path, folder / "whole", folder / "cache")
    assert status == 0, output
    return path, folder / "cache", outcome(folder / "whole")


@pytest.mark.slow
def test_run_killed_at_every_kind_of_moment_ends_as_though_it_had_not_been(whole, tmp_path):
    path, cache, expected = whole
    cache = shutil.copytree(cache, tmp_path / "cache")
    shutil.rmtree(cache / "activations")  # or nothing would be filled
    workdir = tmp_path / "run"
    for moment in (*START, *GOING, *END):
        status, output = command(path, workdir, cache, moment)
        assert status == STATUS[moment.partition("@")[0].partition(",")[0]], (moment, output)
        assert "Traceback" not in output, (moment, output)
    status, output = command(path, workdir, cache)
    assert status == 0, output
    assert outcome(workdir) == expected
    assert not list(tmp_path.glob("run.*"))
    assert "finished before" in output
