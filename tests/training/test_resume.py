"""Runs that are interrupted in mid-run and go on: bit for bit what they would have been; and all that may go wrong."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxtl import config, interrupt, storage
from jaxtl.errors import UserError
from jaxtl.training import checkpoint, freeze, loop, run, suite
from jaxtl.training.network import load_run, run_params

IMAGES = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=32, dropout=0.5)),
    data=config.Images(source="digits", train_size=100, eval_size=50),
    freeze=freeze.train_from("block_3"),
    optim=config.Optim("adamw", learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
    train=config.Train(epochs=3, batch_size=32, eval_batch_size=32, log_every=3),
)
TIMES = ("seconds", "examples_per_second", "peak_memory_bytes", "cache")


def change(experiment, *assignments):
    return config.override(experiment, assignments)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("augmented", "views", "texts", "mlm")]


@pytest.fixture(scope="session")
def texts(bert_folder, text_folder):
    """An experiment on texts, everything learns."""
    data = config.Text(
        dir=str(text_folder), train=("train.csv",), max_length=40, buckets=2, train_size=70, eval_size=30
    )
    return config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=config.Head("fc", "cls", dropout=0.3)),
        data=data,
        optim=config.Optim("adamw", learning_rate=3e-3, schedule="cosine", warmup=0.2),
        train=config.Train(epochs=3, batch_size=16, eval_batch_size=32, log_every=3),
    )


@pytest.fixture(params=["cached_best", *SLOWER])
def experiment(request, texts):
    """Experiments that draw random numbers in every way there is."""
    return {
        "cached_best": change(IMAGES, "train.select=best"),
        "augmented": change(IMAGES, "data.augment=crop_flip", "freeze=train_all()", "train.accumulate_steps=2"),
        "views": change(IMAGES, "data.augment=crop_flip", "plan.cached_views=2", "optim.name=sgd"),
        "texts": texts,
        "mlm": change(texts, "model.head.kind=mlm", "model.head.reads=masked", "data.label_column="),
    }[request.param]


def interrupt_at(monkeypatch, *steps):
    """Has a signal be noted when the figures of the first of these steps are in, in the next process the second .."""
    left, report = list(steps), loop._Loop._report

    def reported(self, done, *rest):
        report(self, done, *rest)
        if left and done >= left[0] and not interrupt.asked():
            left.pop(0)
            monkeypatch.setattr(interrupt, "_asked", 15)

    monkeypatch.setattr(loop._Loop, "_report", reported)


def until_done(experiment, folder, monkeypatch):
    """Gives the same command until the run is finished; returns the result and how often it was interrupted."""
    for interruptions in range(20):
        try:
            return loop.train(experiment, folder), interruptions
        except interrupt.Interrupted:
            monkeypatch.setattr(interrupt, "_asked", None)
    raise AssertionError("it never ends")


def figures(result):
    return {name: value for name, value in result.items() if not name.startswith(TIMES)}


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def assert_same_run(folder, other):
    ours, theirs = checkpoint.load(folder), checkpoint.load(other)
    for item in (
        "params",
        "optimizer",
    ):  # what did best is `trained`; the last checkpoint may be older than its epoch's end
        assert ours.record["sha256"][item] == theirs.record["sha256"][item]
    assert (ours.step, ours.record["batches"]) == (theirs.step, theirs.record["batches"])
    assert checkpoint.digest(load_run(folder).trained) == checkpoint.digest(load_run(other).trained)
    assert lines(folder) == lines(other)


def test_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(experiment, tmp_path, monkeypatch):
    whole = loop.train(experiment, tmp_path / "whole")
    last = whole["steps"]
    assert last >= 10
    # Some steps are under way when the signal comes: two more are done. In mid-epoch, and after the last step.
    interrupt_at(monkeypatch, 1, 5, last // 2, last)
    result, interruptions = until_done(experiment, tmp_path / "parts", monkeypatch)
    assert interruptions == 4
    assert figures(result) == figures(whole)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_interruption_while_evaluating_loses_no_step(tmp_path, monkeypatch):
    experiment, evaluated = change(IMAGES, "train.epochs=2"), []
    whole = loop.train(experiment, tmp_path / "whole")
    evaluate = loop._Loop._evaluate

    def interrupted(self, *rest):
        evaluated.append(self._standing.step)
        if len(evaluated) == 1:
            monkeypatch.setattr(interrupt, "_asked", 2)
        return evaluate(self, *rest)

    monkeypatch.setattr(loop._Loop, "_evaluate", interrupted)
    result, interruptions = until_done(experiment, tmp_path / "parts", monkeypatch)
    assert interruptions == 1
    assert evaluated == [4, 4, 8]  # again at the same step: none was taken twice
    assert figures(result) == figures(whole)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# --- what is saved -----------------------------------------------------------------------------------------


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], [12]),  # in less than ten minutes, only the last one
        (["checkpoint.every_steps=5", "checkpoint.keep=3"], [5, 10, 12]),
        (["checkpoint.every_steps=4", "checkpoint.keep=2"], [8, 12]),
        (["checkpoint.every_minutes=1e-9", "checkpoint.keep=20"], list(range(1, 13))),
    ],
)
def test_checkpoints_are_saved_when_asked_for_and_the_newest_are_kept(assignments, expected, tmp_path):
    loop.train(change(IMAGES, *assignments), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == expected


@pytest.mark.slow
def test_frozen_parameters_are_saved_only_when_asked_for_and_then_the_weights_are_not_needed(tmp_path):
    start = change(IMAGES, "train.max_steps=1")
    loop.train(start, tmp_path / "weights")
    experiment = change(start, f"model.weights={tmp_path / 'weights'}")
    loop.train(experiment, tmp_path / "run")
    loop.train(change(experiment, "checkpoint.save_frozen=true"), tmp_path / "whole")
    expected = run_params(load_run(tmp_path / "run"))[1]
    saved = checkpoint.load(tmp_path / "run")
    assert saved.params.keys() < expected.keys()
    assert not any(path.startswith(("block_1/", "block_2/", "embeddings/")) for path in saved.params)
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(UserError, match="no such file"):
        run_params(load_run(tmp_path / "run"))
    found = run_params(load_run(tmp_path / "whole"))[1]
    assert checkpoint.digest(found) == checkpoint.digest(expected)


@pytest.mark.slow
def test_frozen_leaves_stay_bitwise_equal_under_weight_decay_and_clipping(tmp_path):
    experiment = change(IMAGES, "checkpoint.save_frozen=true", "optim.weight_decay=0.5", "plan.cache=off")
    short = loop.train(change(experiment, "train.max_steps=1"), tmp_path / "short")
    long = loop.train(experiment, tmp_path / "long")
    assert short["frozen_sha256"] == long["frozen_sha256"]
    before, after = (run_params(load_run(tmp_path / name))[1] for name in ("short", "long"))
    trained = load_run(tmp_path / "long").trained
    for path in before:
        if path.endswith("attention/key/bias"):  # softmax takes away what it adds: its gradient is nothing but rounding
            continue
        assert np.array_equal(before[path], after[path]) == (path not in trained), path


# --- what stops a run from going on ----------------------------------------------------------------------------


@pytest.fixture
def begun(request, tmp_path, monkeypatch, texts):
    """A run that was interrupted in its second epoch, with the checkpoints of steps 4 and 7."""
    chosen = change(texts, "train.batch_size=20") if getattr(request, "param", "images") == "texts" else IMAGES
    experiment = change(chosen, "checkpoint.every_steps=4")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)  # two more are under way
        with pytest.raises(interrupt.Interrupted):
            loop.train(experiment, tmp_path / "run")
    monkeypatch.setattr(interrupt, "_asked", None)
    assert saved_steps(tmp_path / "run") == [4, 7]
    return experiment, tmp_path / "run"


def test_other_settings_are_refused_by_name_and_places_are_free(begun):
    experiment, folder = begun
    with pytest.raises(UserError, match=r"other settings \(train.epochs\); .* --overwrite"):
        loop.train(change(experiment, "train.epochs=4"), folder)
    moved = change(experiment, f"plan.cache_dir={folder.parent / 'cache'}", "checkpoint.keep=5")
    assert loop.train(moved, folder)["steps"] == 12


@pytest.mark.slow
def test_overwrite_moves_the_unfinished_run_aside(begun):
    experiment, folder = begun
    loop.train(change(experiment, "train.max_steps=1"), folder, overwrite=True)
    (aside,) = folder.parent.glob("run.*")
    assert saved_steps(aside) == [4, 7]
    assert saved_steps(folder) == [1]


def test_changed_data_and_weights_are_noticed(begun, monkeypatch):
    experiment, folder = begun
    fewer = loop.look

    def others(*arguments):
        this, splits = fewer(*arguments)
        swapped = splits[0].take(np.arange(len(splits[0].labels))[::-1])
        return this, [swapped, *splits[1:]]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "look", others)
        with pytest.raises(UserError, match=r"the data have changed since .*step 7"):
            loop.train(experiment, folder)
    initial = loop.initial_params

    def other(*arguments):
        params = initial(*arguments)
        first = next(iter(params))
        return {**params, first: params[first] + 1}

    monkeypatch.setattr(loop, "initial_params", other)
    with pytest.raises(UserError, match=r"the weights that model\.weights=random names have changed"):
        loop.train(experiment, folder)


def hold(folder, ready, leave):
    with run.Claim(folder) as claim:
        claim.take()
        ready.set()
        leave.wait(60)


def test_second_process_is_refused_and_told_by_whom_and_a_dead_owner_is_no_owner(begun):
    experiment, folder = begun
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder, ready, leave))
    (folder / "experiment.json").rename(folder / "aside")  # the other process takes what it thinks is a new folder
    other.start()
    assert ready.wait(60)
    (folder / "aside").rename(folder / "experiment.json")
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on {os.uname().nodename}"):
        loop.train(experiment, folder)
    other.kill()
    other.join()
    assert (folder / "lock").read_text().startswith(f"process {other.pid} ")
    assert loop.train(experiment, folder)["steps"] == 12


# --- damage ----------------------------------------------------------------------------------------------------


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("begun", "damage"),
    [
        ("images", "flipped"),
        pytest.param("texts", "truncated", marks=pytest.mark.slow),
        pytest.param("images", "missing", marks=pytest.mark.slow),
    ],
    indirect=["begun"],
)
def test_damaged_newest_checkpoint_is_put_aside_and_the_one_before_it_used(begun, damage, tmp_path, capsys):
    """Every file of it, one after the other. Some are only copies or marks: then what was saved is still there."""
    experiment, folder = begun
    loop.train(experiment, tmp_path / "whole")
    older = checkpoint.load(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("7")))
    newer = checkpoint.load(folder)
    noticed = 0
    names = [path.relative_to(folder) for path in files(folder / "checkpoints" / "7")]
    assert len(names) > 10
    for number, name in enumerate(names):
        copy = shutil.copytree(folder, tmp_path / f"copy{number}")
        path = copy / name
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 16] if content else []) + content[middle + 1 :]
            )
        capsys.readouterr()
        found = checkpoint.load(copy)
        told = capsys.readouterr().err
        if found.step == 7:
            assert found.record == newer.record, name
            assert checkpoint.digest(found.params) == checkpoint.digest(newer.params), name
        else:
            noticed += 1
            assert found.record == older.record, name
            assert "THE CHECKPOINT OF STEP 7 IS DAMAGED" in told, name
            assert len(list((copy / "damaged").glob("7.*"))) == 1
            assert saved_steps(copy) == [4]
    assert noticed >= 5  # record, and the arrays of two items
    last = tmp_path / f"copy{len(names) - 1}"
    loop.train(experiment, last)
    assert_same_run(last, tmp_path / "whole")


def test_no_sound_checkpoint_is_an_error_again_and_again_and_never_a_fresh_start(begun):
    experiment, folder = begun
    for step in (4, 7):
        for path in files(folder / "checkpoints" / str(step) / "params"):
            path.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(UserError, match=r"all checkpoints .* are damaged \(step 7: .*; step 4: .*--overwrite"):
            loop.train(experiment, folder)
    assert saved_steps(folder) == [4, 7]
    assert loop.train(experiment, folder, overwrite=True)["steps"] == 12


@pytest.mark.parametrize("what", ["trained", "frozen"])
def test_damaged_result_of_a_run_is_told(what, tmp_path):
    loop.train(change(IMAGES, "train.max_steps=1", "checkpoint.save_frozen=true"), tmp_path / "run")
    biggest = max(files(tmp_path / "run" / what), key=lambda path: path.stat().st_size)
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 1
    biggest.write_bytes(content)
    with pytest.raises(UserError, match=rf"{what} is damaged"):
        run_params(load_run(tmp_path / "run"))


# --- no room ---------------------------------------------------------------------------------------------------


class Limit:
    """Lets no file grow beyond a size, as a full disk does: the system refuses the write."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_training_goes_on_when_a_checkpoint_cannot_be_saved_and_what_was_saved_stays(tmp_path, monkeypatch, capsys):
    experiment = change(IMAGES, "checkpoint.every_steps=2", "checkpoint.keep=10")
    whole = loop.train(experiment, tmp_path / "whole")
    save = checkpoint.Saver.save
    full = []

    def limited(self, state, *rest):
        if int(state.step) in (4, 6):
            full.append(int(state.step))
            with Limit(20_000):
                save(self, state, *rest)
                self.wait()
        else:
            save(self, state, *rest)

    monkeypatch.setattr(checkpoint.Saver, "save", limited)
    result = loop.train(experiment, tmp_path / "run")
    told = capsys.readouterr().err
    assert full == [4, 6]
    assert "THE CHECKPOINT OF STEP 4 COULD NOT BE SAVED" in told
    assert "the last one is that of step 2" in told
    assert saved_steps(tmp_path / "run") == [2, 8, 10, 12]
    assert figures(result) == figures(whole)


def test_run_whose_last_checkpoint_cannot_be_saved_ends_with_what_to_do_and_loses_nothing(tmp_path, monkeypatch):
    experiment = change(IMAGES, "checkpoint.every_steps=5")
    whole = loop.train(experiment, tmp_path / "whole")
    with monkeypatch.context() as patch:
        save = checkpoint.Saver.save

        def limited(self, state, *rest):
            with Limit(20_000 if int(state.step) > 10 else resource.RLIM_INFINITY):
                save(self, state, *rest)
                self.wait()

        patch.setattr(checkpoint.Saver, "save", limited)
        with pytest.raises(UserError, match="make room there and give the same command again"):
            loop.train(experiment, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [5, 10]
    assert figures(loop.train(experiment, tmp_path / "run")) == figures(whole)


def test_lines_that_cannot_be_written_come_later(tmp_path, capsys):
    recorder = run.Recorder(tmp_path / "run", IMAGES, None)
    recorder.metrics("train", 1, 0.1, {"loss": 1.0})
    with Limit(70):
        recorder.metrics("train", 2, 0.2, {"loss": 2.0})
        recorder.metrics("train", 3, 0.3, {"loss": 3.0})
    assert "metrics.jsonl cannot be written" in capsys.readouterr().err
    recorder.metrics("train", 4, 0.4, {"loss": 4.0})
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


# --- numbers that are not finite ---------------------------------------------------------------------------------


def spoil(monkeypatch, *steps):
    """Makes the images of these steps' batches infinite once they are on the device."""
    make = loop.loader.batches

    class Spoilt:
        def __init__(self, batches):
            self._batches, self._count = batches, 0

        def __next__(self):
            batch = next(self._batches)
            self._count += 1
            if self._count in steps:
                batch["weight"] = batch["weight"] * np.float32(math.inf)
            return batch

        def __getattr__(self, name):
            return getattr(self._batches, name)

    monkeypatch.setattr(
        loop.loader, "batches", lambda *a, **k: Spoilt(make(*a, **k)) if k.get("epochs") else make(*a, **k)
    )


def test_not_finite_stops_with_step_rate_and_examples_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch, 7)
    experiment = change(IMAGES, "checkpoint.every_steps=5", "optim.schedule=linear")
    with pytest.raises(UserError, match=r"at step 7 \(learning rate 0\.0005; examples digits:\d+, .*step 5 is kept"):
        loop.train(experiment, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run").step == 5
    (line,) = [line for line in lines(tmp_path / "run") if line["split"] == "not_finite"]
    assert (line["step"], len(line["examples"])) == (7, 32)


def test_skipped_step_changes_nothing_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoil(patch, 2)
        result = loop.train(change(IMAGES, "train.on_nonfinite=skip", "train.max_steps=2"), tmp_path / "run")
    assert result["skipped_steps"] == 1
    assert "at step 2" in capsys.readouterr().err
    whole = loop.train(change(IMAGES, "train.max_steps=1"), tmp_path / "one")
    assert result["skipped_steps"] > whole["skipped_steps"] == 0
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "run"))
    assert checkpoint.digest(one.params) == checkpoint.digest(two.params)
    assert one.record["sha256"]["optimizer"] == two.record["sha256"]["optimizer"]


def test_run_that_only_skips_ends(tmp_path, monkeypatch):
    spoil(monkeypatch, *range(1, 200))
    experiment = dataclasses.replace(IMAGES, train=dataclasses.replace(IMAGES.train, epochs=30, on_nonfinite="skip"))
    with pytest.raises(UserError, match="not finite at step 50 "):
        loop.train(experiment, tmp_path / "run")


def test_run_is_repeated_from_its_folder_alone(tmp_path):
    first = loop.train(IMAGES, tmp_path / "run")
    text = (tmp_path / "run" / "experiment.json").read_text()
    again = loop.train(config.from_json(text, "experiment.json"), tmp_path / "again")
    assert figures(again) == figures(first)
    assert_same_run(tmp_path / "again", tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__


# --- starts that fail, and two processes at once -------------------------------------------------------------------


def test_process_that_would_overwrite_a_live_run_is_refused(tmp_path):
    with run.Claim(tmp_path / "run") as first, run.Claim(tmp_path / "run") as second:
        first.take(anew=True)  # both saw an empty place
        run.Recorder(tmp_path / "run", IMAGES, None)
        for anew in (True, False):
            with pytest.raises(UserError, match="in use by process"):
                second.take(anew=anew)
    assert not list(tmp_path.glob("run.*"))


def test_two_processes_that_saw_an_empty_place_do_not_run_one_after_the_other_in_it(tmp_path):
    with run.Claim(tmp_path / "run") as late:
        with run.Claim(tmp_path / "run") as early:
            early.take()
            run.Recorder(tmp_path / "run", IMAGES, None)
        with pytest.raises(UserError, match="another process began a run"):
            late.take()


def test_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    experiment = change(IMAGES, "checkpoint.every_steps=4", "plan.cache_disk_gb=0")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(interrupt.Interrupted):
            loop.train(experiment, tmp_path / "run")
    assert loop.train(experiment, tmp_path / "run")["steps"] == 12
    assert "without locks" in capsys.readouterr().err


def test_start_that_failed_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    experiment = change(IMAGES, "train.max_steps=1")

    def full(*_):
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(run.storage, "write", full)
        with pytest.raises(UserError, match="no space"):
            loop.train(experiment, tmp_path / "run")
    (tmp_path / "run" / ".experiment.json.0a1b2c3d.tmp").touch()
    assert loop.train(experiment, tmp_path / "run")["steps"] == 1


def test_checkpoint_that_the_system_does_not_let_be_read_is_not_called_damaged(begun, monkeypatch):
    experiment, folder = begun

    def read(_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(checkpoint, "_read", read)
    with pytest.raises(UserError, match="7 cannot be read: Too many open files; nothing was changed"):
        loop.train(experiment, folder)
    assert saved_steps(folder) == [4, 7]


def test_lost_checkpoints_are_not_taken_for_a_run_that_has_none_yet(begun, capsys):
    experiment, folder = begun
    (folder / "trained").mkdir()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="put checkpoints back, or --overwrite"):
        loop.train(experiment, folder)
    (folder / "trained").rmdir()
    capsys.readouterr()
    assert loop.train(experiment, folder)["steps"] == 12
    assert "before its first checkpoint: it starts from step 0" in capsys.readouterr().err


def test_plan_that_changed_between_two_processes_is_refused(begun, monkeypatch):
    experiment, folder = begun
    monkeypatch.setattr(loop.cache, "run_prefix", lambda *_: None)
    with pytest.raises(UserError, match="began with kept activations"):
        loop.train(experiment, folder)


def test_run_that_began_without_room_for_activations_goes_on_without_them(tmp_path, monkeypatch, capsys):
    """Room or none may change between two processes: a run that is queued again has nobody to look after it."""
    with monkeypatch.context() as full:
        full.setattr(loop.cache, "run_prefix", lambda *_: None)
        whole = loop.train(IMAGES, tmp_path / "whole")
        interrupt_at(full, 5)
        with pytest.raises(interrupt.Interrupted):
            loop.train(IMAGES, tmp_path / "parts")
    monkeypatch.setattr(interrupt, "_asked", None)
    capsys.readouterr()
    assert figures(loop.train(IMAGES, tmp_path / "parts")) == figures(whole)
    assert "the frozen stages run in every step, as they did" in capsys.readouterr().err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("content", ["[1]", "3", "null", "{}", '{"accuracy": 1}', "\udcff"])
def test_result_that_is_none_is_told(tmp_path, content):
    loop.train(change(IMAGES, "train.max_steps=1"), tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="holds a damaged run"):
        run.finished(tmp_path / "run", change(IMAGES, "train.max_steps=1"), overwrite=False)
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        load_run(tmp_path / "run")


@pytest.mark.slow
def test_member_made_from_a_source_that_is_trained_anew_is_not_taken_for_finished(tmp_path, monkeypatch):
    small = change(IMAGES, "train.max_steps=1")
    chosen = config.Suite((("a", small), ("b", change(small, "model.weights=suite:a"))))
    suite.run(chosen, tmp_path)
    train, trained = loop.train, []

    def cut_short(experiment, workdir, **rest):
        if trained:
            raise KeyboardInterrupt
        trained.append(workdir.name)
        return train(experiment, workdir, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(suite.loop, "train", cut_short)
        with pytest.raises(KeyboardInterrupt):
            suite.run(chosen, tmp_path, overwrite=True)
    assert trained == ["a"]
    suite.run(chosen, tmp_path)
    assert len(list(tmp_path.glob("b.*"))) == 1
    assert (tmp_path / "b" / "result.json").is_file()


def test_signal_ends_a_process_whose_terminal_takes_no_output():
    """Standard error is a pipe that is full: the line cannot be written, and the process must end all the same."""
    program = (
        "import os, signal, time\n"
        "from jaxtl import interrupt\n"
        "with interrupt.handled('again'), interrupt.deferred():\n"
        "    print('ready', flush=True)\n"
        "    os.set_blocking(2, False)\n"
        "    try:\n"
        "        while True: os.write(2, b'x' * 4096)\n"
        "    except BlockingIOError: os.set_blocking(2, True)\n"
        "    print('full', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert [process.stdout.readline().strip() for _ in range(2)] == [b"ready", b"full"]
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (130, 143)
