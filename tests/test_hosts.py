"""Several real processes on this machine: the same run as one, stopped together, gone on from by any number."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxtl import config, hosts
from jaxtl.errors import UserError
from jaxtl.training import checkpoint, loop, sharding
from jaxtl.training import run as train_run

sys.path.append(str(Path(__file__).parent))
interrupted = importlib.import_module("interrupted")
IMAGES, lines = interrupted.IMAGES, interrupted.lines
FAULTS = Path(__file__).parent / "faults.py"


def start(experiment, workdir, processes, moments=(), devices=1, report=False):
    """Begins the command in so many processes; `moments` are those of `faults`, by process."""
    path = workdir.parent / "experiment.json"
    path.write_text(config.to_json(experiment))
    port = interrupted.free_port()
    started = []
    for number in range(processes):
        flags = [f"--experiment={path}", f"--workdir={workdir}"]
        if processes > 1:
            flags += [f"--coordinator=127.0.0.1:{port}", f"--process_count={processes}", f"--process_id={number}"]
        environment = {
            "JAXTL_CACHE": str(workdir.parent / "cache"),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,  # the same programs in many tests
            # Compiled for a few steps: the less is done about it, the sooner it is over.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            "JAXTL_TEST_REPORT": str(report),
        }
        moment = moments[number] if number < len(moments) else ""
        output = (workdir.parent / f"output-{number}").open("wb")
        started.append(
            subprocess.Popen(
                [sys.executable, FAULTS, f"{moment or 'SIGKILL@'}", *flags],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def end(started, workdir, seconds=240):
    """Returns exit status and output of each."""
    try:
        statuses = [process.wait(seconds) for process in reversed(started)][::-1]
    finally:
        for process in started:
            process.kill()
    return statuses, [(workdir.parent / f"output-{number}").read_text() for number in range(len(started))]


def said(line, output, seconds=20):
    """Whether the output of a process has the line, or gets it soon: from its witness, who outlives it."""
    until = time.monotonic() + seconds
    while not (found := line in output.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def run(*args, **rest):
    workdir = args[1]
    return end(start(*args, **rest), workdir)


def assert_same(folder, other, exactly):
    ours, theirs = checkpoint.load(folder), checkpoint.load(other)
    assert ours.step == theirs.step
    assert ours.record["batches"] == theirs.record["batches"]
    if exactly:
        assert ours.record["sha256"] == theirs.record["sha256"]
        assert lines(folder) == lines(other)
        assert (folder / "predictions.npz").read_bytes() == (other / "predictions.npz").read_bytes()
        return
    one, two = (np.array([line["loss"] for line in lines(path)]) for path in (folder, other))
    np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of a run of two processes that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    statuses, outputs = run(IMAGES, workdir, 2, report=True)
    assert statuses == [0, 0], outputs
    assert "report" in outputs[0]
    # The first one talks; Gloo itself says that it is connected.
    assert [line for line in outputs[1].splitlines() if not line.startswith("[Gloo]")] == []
    return workdir


@pytest.mark.slow
def test_files_of_a_run_are_written_once(two):
    names = {path.name for path in two.iterdir()}
    assert {"result.json", "report", "trained", "checkpoints"} <= names
    result = loop.train(IMAGES, two)  # one process reports what two have done
    assert result["steps"] == 9
    assert len(result["seconds_train_by_process"]) == 2


def kept_by(cache, process):
    """The bytes of activations that one of several processes has kept, or (None) that a process alone has."""
    found = 0
    for description in cache.rglob("array.json"):
        of = json.loads(description.read_text())["holds"].get("process")
        if (of and of[0]) == process:
            found += description.with_name("array.bin").stat().st_size
    return found


VARIANTS = {  # images of IMAGES, or texts; changes; processes, devices of each
    "cached": ("images", ["plan.cache_budget_gb=0"], (4, 1)),  # in memory-mapped files
    "divided": ("images", ["freeze=train_all()", "parallel.fsdp=2"], (2, 2)),
    "texts": ("texts", ["freeze=train_all()"], (2, 1)),
    "cached texts": ("texts", ["freeze=train_head_only()"], (2, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_processes_give_the_run_of_one(name, tmp_path, monkeypatch, bert_folder, text_folder):
    """Every example counts once, wherever it is read: sums in another order, see `test_sharding`."""
    kind, changes, (processes, devices) = VARIANTS[name]
    experiment = IMAGES
    if kind == "texts":
        data = config.Text(
            dir=str(text_folder), train=("train.csv",), max_length=40, buckets=2, train_size=80, eval_size=48
        )
        model = config.Model("from_weights", str(bert_folder), head=config.Head("bigru", "sequence", 32, dropout=0.3))
        experiment = dataclasses.replace(IMAGES, model=model, data=data)
    experiment = config.override(experiment, changes)
    monkeypatch.setenv("JAXTL_CACHE", str(tmp_path / "cache"))
    loop.train(config.override(experiment, ["parallel.fsdp=1"]), tmp_path / "one")
    workdir = tmp_path / "run"
    statuses, outputs = run(experiment, workdir, processes, devices=devices)
    assert statuses == [0] * processes, outputs
    assert_same(workdir, tmp_path / "one", exactly=False)
    if name.startswith("cached"):  # each process keeps its share
        alone, *shares = (kept_by(tmp_path / "cache", process) for process in (None, *range(processes)))
        assert sum(shares) == alone > 0
        assert max(shares) < 1.5 * min(shares)
    one, found = (np.load(folder / "predictions.npz") for folder in (tmp_path / "one", workdir))
    assert found["ids"].tolist() == one["ids"].tolist()
    np.testing.assert_allclose(found["logits"], one["logits"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_damaged_image_of_one_process_is_a_mistake_for_all(tmp_path):
    for number in range(24):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
    path.write_bytes(b"damaged")
    data = config.Images(source="folder", dir=str(tmp_path / "images"), eval_fraction=0.5)
    statuses, outputs = run(dataclasses.replace(IMAGES, data=data), tmp_path / "run", 2)
    assert statuses == [2, 2], outputs
    ended = sorted(output.splitlines()[-1] for output in outputs)
    assert "another process cannot decode its images" in ended[0], ended
    assert f"unreadable images (1), repair or remove them: b/{path.name} (not an image)" in ended[1], ended


@pytest.mark.slow
def test_error_in_one_process_ends_all(two, tmp_path):
    """Another run has the folder, which only the process that writes there finds out."""
    workdir = tmp_path / "run"
    with train_run.Claim(workdir) as claim:
        claim.take()
        statuses, outputs = run(IMAGES, workdir, 2)
    # JAX aborts a process that is not waiting for the others when it hears of the end of the first.
    assert statuses in ([2, 1], [2, -signal.SIGABRT]), outputs
    assert "is in use by" in outputs[0]
    assert said("another process of this run has ended", tmp_path / "output-1")


def test_aborted_process_has_its_line_said_for_it_and_no_other_has(tmp_path):
    """The second computes for itself when the first is killed: JAX aborts it. The third has ended before, well."""
    port = interrupted.free_port()
    program = f"""
import os, sys, time
from jaxtl import cli, hosts
number = int(sys.argv[1])
hosts.start(auto=False, coordinator="127.0.0.1:{port}", count=3, number=number)
hosts.together("here")
if number == 2: cli.fail("in order")
time.sleep(3 if number == 0 else 60)
os._exit(9)
"""
    outputs = [tmp_path / f"output-{number}" for number in range(3)]
    started = []
    for number, output in enumerate(outputs):
        with output.open("wb") as file:
            started.append(subprocess.Popen([sys.executable, "-c", program, str(number)], stdout=file, stderr=file))
    assert [process.wait(60) for process in started] == [9, -signal.SIGABRT, 2]
    assert said("the same command on all of them goes on", outputs[1])
    assert outputs[1].read_text().splitlines()[-1].startswith("jaxtl: error: this process was aborted or killed")
    assert outputs[2].read_text().splitlines()[-1] == "jaxtl: error: in order"


@pytest.mark.slow
def test_killed_process_ends_the_others_and_the_run_goes_on_bit_for_bit(two, tmp_path):
    workdir = tmp_path / "run"
    started = start(IMAGES, workdir, 2, ["", "SIGKILL@jaxtl.training.loop:_Loop._report#5"])
    try:
        assert started[1].wait(240) == -signal.SIGKILL
    finally:
        begun = time.monotonic()
        statuses, outputs = end(started, workdir)
    assert statuses[0] == 1, outputs[0]
    assert time.monotonic() - begun < 30 + hosts.SILENCE
    assert "another process of this run has ended" in outputs[0], outputs[0]
    statuses, outputs = run(IMAGES, workdir, 2)
    assert statuses == [0, 0], outputs
    assert "going on after step" in outputs[0]
    assert_same(workdir, two, exactly=True)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_after_the_same_step(two, tmp_path):
    workdir = tmp_path / "run"
    statuses, outputs = run(IMAGES, workdir, 2, ["", "SIGTERM@jaxtl.training.loop:_Loop._report#2"])
    assert statuses == [143, 143], outputs
    saved = checkpoint.load(workdir)
    assert 2 < saved.step < 9
    statuses, outputs = run(IMAGES, workdir, 2)
    assert statuses == [0, 0], outputs
    assert f"going on after step {saved.step}" in outputs[0]
    assert_same(workdir, two, exactly=True)


@pytest.mark.slow
def test_run_of_four_goes_on_in_one_and_of_one_in_two(tmp_path, two, monkeypatch):
    monkeypatch.setenv("JAXTL_CACHE", str(tmp_path / "cache"))
    workdir = tmp_path / "run"
    statuses, outputs = run(IMAGES, workdir, 4, ["SIGTERM@jaxtl.training.loop:_Loop._report#2"])
    assert statuses == [143] * 4, outputs
    statuses, outputs = run(IMAGES, workdir, 1, ["SIGTERM@jaxtl.training.loop:_Loop._report#1"])
    assert statuses == [143], outputs
    statuses, outputs = run(IMAGES, workdir, 2)
    assert statuses == [0, 0], outputs
    assert_same(workdir, two, exactly=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"auto": True, "coordinator": "a:1"}, "leave out"),
        ({"coordinator": "127.0.0.1:1"}, "--process_count, --process_id is missing"),
        ({"coordinator": "127.0.0.1:1", "count": 2, "number": 2}, "--process_id=2 must be from 0 to 1"),
        ({"coordinator": "here", "count": 2, "number": 0}, "expected HOST:PORT"),
        ({"coordinator": "here:99999", "count": 2, "number": 0}, "expected HOST:PORT"),
        ({"coordinator": "127.0.0.1:9", "count": 2, "number": 1}, "no process listens there"),
    ],
)
def test_flags_that_do_not_fit_are_told(given, message, monkeypatch):
    monkeypatch.setattr(hosts, "WAIT", 0.6)
    with pytest.raises(UserError, match=message):
        hosts.start(**{"auto": False, "coordinator": None, "count": None, "number": None, **given})


def test_one_process_of_one_runs():
    port = interrupted.free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", "--process_count=1", "--process_id=0", "--list"]
    ended = subprocess.run([sys.executable, "-m", "jaxtl.main", *flags], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "quickstart" in ended.stdout


def test_one_process_alone_is_known_without_taking_the_accelerator(monkeypatch):
    """Which a second command would wait for, or fail on, before it hears that the run folder is in use."""

    def taken():
        raise AssertionError("JAX was asked")

    monkeypatch.setattr(jax, "process_count", taken)
    monkeypatch.setattr(jax, "process_index", taken)
    assert (hosts.count(), hosts.first()) == (1, True)
    hosts.together("alone")
    hosts.leave()


def test_arrays_are_gathered_by_one_program_for_each_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (sharding.DATA, sharding.FSDP))
    assert sharding._whole(mesh) is sharding._whole(mesh)
