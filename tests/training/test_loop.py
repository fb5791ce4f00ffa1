"""Whole runs on real images (scikit-learn's digits): what they write, repeat, keep and refuse."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxtl import config
from jaxtl.errors import UserError
from jaxtl.training import freeze, loop, suite
from jaxtl.training.network import load_run
from jaxtl.training.run import finished

BASE = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=32, dropout=0.5)),
    data=config.Images(source="digits", train_size=100, eval_size=50),
    freeze=freeze.train_from("block_3"),
    optim=config.Optim("adamw", learning_rate=1e-3, weight_decay=0.1),
    train=config.Train(epochs=2, batch_size=32, eval_batch_size=32, log_every=2),
)


def change(experiment, *assignments):
    return config.override(experiment, assignments)


def test_run_folder_holds_what_is_promised(tmp_path):
    result = loop.train(BASE, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert config.from_json((tmp_path / "run" / "experiment.json").read_text(), "run") == BASE
    # 100 examples in batches of 32: 4 steps an epoch, the last with 4 examples.
    assert result["steps"] == 8
    assert (result["train_examples"], result["eval_examples"]) == (100, 50)
    width = 64
    block = 12 * width**2 + 13 * width
    assert result["trainable_parameters"] == 2 * block + 2 * width + 64 * 32 + 32 + 32 * 10 + 10
    assert 0 < result["accuracy"] <= 1
    assert (result["accuracy"] * 50) == pytest.approx(round(result["accuracy"] * 50))
    for field in ("seconds_train", "seconds_per_epoch", "seconds_compile", "peak_memory_bytes"):
        assert result[field] > 0
    assert result["versions"]["jax"]
    assert result["device"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [
        *[("train", 2), ("train", 4), ("train_epoch", 4), ("eval", 4)],
        *[("train", 6), ("train", 8), ("train_epoch", 8), ("eval", 8)],
    ]
    assert all(line.keys() >= {"epoch", "loss", "accuracy", "examples_per_second"} for line in lines)
    assert lines[-1]["accuracy"] == result["accuracy"]
    assert lines[-1]["epoch"] == 2


def test_same_seed_repeats_bit_for_bit_and_another_seed_does_not(tmp_path):
    runs = [
        loop.train(change(BASE, f"train.seed={seed}"), tmp_path / str(index)) for index, seed in enumerate((1, 1, 2))
    ]
    assert runs[0]["loss"] == runs[1]["loss"] != runs[2]["loss"]
    first, second, other = (load_run(tmp_path / str(index)).trained for index in range(3))
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], path)
    assert any(not np.array_equal(value, other[path]) for path, value in first.items())


@pytest.mark.parametrize(
    "rules", [freeze.train_from("block_3"), freeze.train_head_only()], ids=["last_blocks", "head_only"]
)
def test_cache_changes_nothing_but_rounding(tmp_path, rules):
    """Float32 either way: the two programs fuse differently, so activations may differ in their last bits.

    Eight steps of Adam, each normalising its gradient, carry that on: 1e-4 of the largest parameter is a fraction of
    one step's length (1e-3).
    """
    experiment = dataclasses.replace(BASE, freeze=rules)
    results = {
        cache: loop.train(change(experiment, f"plan.cache={cache}"), tmp_path / cache) for cache in ("on", "off")
    }
    assert results["on"]["loss"] == pytest.approx(results["off"]["loss"], rel=1e-4)
    assert results["on"]["accuracy"] == results["off"]["accuracy"]
    trained = {cache: load_run(tmp_path / cache).trained for cache in results}
    for path, value in trained["on"].items():
        if not path.endswith("attention/key/bias"):  # its gradient is zero: Adam makes steps out of rounding alone
            np.testing.assert_allclose(value, trained["off"][path], atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        (["freeze=train_all()"], "first stage learns"),
        (["data.augment=flip"], "changes the input"),
        (["plan.cache_budget_gb=0.000001", "plan.cache_disk_gb=0"], "plan.cache_budget_gb is 1e-06"),
    ],
)
def test_cache_that_cannot_be_is_refused_when_insisted_on(tmp_path, assignments, reason):
    with pytest.raises(UserError, match=reason):
        loop.train(change(BASE, "plan.cache=on", *assignments), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_compiled_once_the_first_step_has_been_sent(tmp_path, monkeypatch):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    counts = []

    def counted(function):
        def call(*arguments):
            before = len(compiled)
            result = function(*arguments)
            counts.append(len(compiled) - before)
            return result

        return call

    make = loop.evaluator
    monkeypatch.setattr(loop._Loop, "_run_steps", counted(loop._Loop._run_steps))
    monkeypatch.setattr(loop, "evaluator", lambda *arguments: counted(make(*arguments)))
    loop.train(change(BASE, "plan.cache=off"), tmp_path / "run")
    assert compiled  # the listener hears
    assert counts == [0, 0, 0, 0]


def test_evaluation_counts_every_example_once_whatever_the_batch_size(tmp_path):
    results = [
        loop.train(change(BASE, "train.max_steps=1", f"train.eval_batch_size={size}"), tmp_path / str(size))
        for size in (7, 50, 64)
    ]
    # The same logits but for rounding, each counted once: the mean over 50 examples is the same.
    assert results[0]["accuracy"] == results[1]["accuracy"] == results[2]["accuracy"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-5)


def test_max_steps_ends_the_run_in_the_middle_of_an_epoch_with_an_evaluation(tmp_path):
    result = loop.train(change(BASE, "train.max_steps=5"), tmp_path / "run")
    assert result["steps"] == 5
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["split"], last["step"], last["epoch"]) == ("eval", 5, 1.25)


@pytest.mark.slow
def test_a_run_starts_from_what_another_run_trained(tmp_path):
    """What the second run holds of the backbone must be the first run's, trained and frozen."""
    loop.train(change(BASE, "data.classes=0,1,2,3,4"), tmp_path / "first")
    second = change(BASE, "data.classes=5,6,7", f"model.weights={tmp_path / 'first'}", "freeze=train_from('norm')")
    loop.train(second, tmp_path / "second")
    from jaxtl.training.network import initial_params
    from jaxtl.training.setup import describe

    weights = tmp_path / "first"
    net = describe(second, weights, 3, 10, 10).net
    start = initial_params(net, second.model, weights, seed=0)
    trained = load_run(weights).trained
    fresh = initial_params(net, second.model, None, seed=0)
    for path, value in start.items():
        if path.startswith(("block_3", "block_4", "norm")):
            np.testing.assert_array_equal(value, trained[path], path)
        else:  # frozen in the first run, at its random values; the head is new
            np.testing.assert_array_equal(value, fresh[path], path)


def test_weights_of_a_run_that_never_finished_are_refused(tmp_path):
    (tmp_path / "experiment.json").write_text(config.to_json(BASE))
    with pytest.raises(UserError, match="has not finished"):
        loop.train(change(BASE, f"model.weights={tmp_path}"), tmp_path / "run")


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    experiment = change(BASE, "optim.name=sgd", "optim.learning_rate=1e30", "freeze=train_all()")
    with pytest.raises(UserError, match=r"not finite at step \d"):
        loop.train(experiment, tmp_path / "run")


def test_finished_run_is_reported_a_changed_one_refused_and_overwrite_keeps_the_old(tmp_path):
    workdir = tmp_path / "run"
    assert finished(workdir, BASE, overwrite=False) is None
    experiment = change(BASE, "train.max_steps=1")
    result = loop.train(experiment, workdir)
    assert finished(workdir, experiment, overwrite=False) == result
    with pytest.raises(UserError, match=r"other settings \(optim.learning_rate, train.seed\)"):
        finished(workdir, change(experiment, "train.seed=3", "optim.learning_rate=1"), overwrite=False)
    assert finished(workdir, experiment, overwrite=True) is None
    assert not list(tmp_path.glob("run.*"))  # nothing is moved before the new run begins to write
    loop.train(change(experiment, "train.seed=3"), workdir, overwrite=True)
    (moved,) = tmp_path.glob("run.*")
    assert json.loads((moved / "result.json").read_text()) == result


def test_run_that_never_finished_is_not_gone_on_with_under_other_settings(tmp_path):
    with pytest.raises(UserError, match=r"try a lower optim\.learning_rate"):
        loop.train(change(BASE, "optim.name=sgd", "optim.learning_rate=1e30", "freeze=train_all()"), tmp_path / "run")
    better = change(BASE, "train.max_steps=1")
    with pytest.raises(UserError, match=r"other settings \(freeze, optim.name, optim.learning_rate, train.max_steps"):
        loop.train(better, tmp_path / "run")
    assert loop.train(better, tmp_path / "run", overwrite=True)["steps"] == 1
    assert len(list(tmp_path.glob("run.*"))) == 1


def test_damaged_result_is_told_and_can_be_moved_aside(tmp_path):
    loop.train(change(BASE, "train.max_steps=1"), tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(UserError, match="holds a damaged run"):
        finished(tmp_path / "run", BASE, overwrite=False)
    assert finished(tmp_path / "run", BASE, overwrite=True) is None


def test_run_cut_off_before_its_result_ends_as_it_would_have(tmp_path):
    experiment = change(BASE, "train.max_steps=1")
    result = loop.train(experiment, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert finished(tmp_path / "run", experiment, overwrite=False) is None
    assert loop.train(experiment, tmp_path / "run")["loss"] == result["loss"]


def test_folder_with_other_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files but no run"):
            finished(tmp_path, BASE, overwrite)
    with pytest.raises(UserError, match=r"thesis.tex is not a folder"):
        finished(tmp_path / "thesis.tex" / "run", BASE, overwrite=False)


def test_suite_hands_a_run_on_and_repeats_nothing(tmp_path, capsys):
    small = change(BASE, "train.max_steps=2")
    chosen = config.Suite((("a", small), ("b", change(small, "model.weights=suite:a"))))
    suite.run(chosen, tmp_path)
    assert json.loads((tmp_path / "b" / "experiment.json").read_text())["model"]["weights"] == str(tmp_path / "a")
    stamps = {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in "ab"}
    suite.run(chosen, tmp_path)
    assert stamps == {name: (tmp_path / name / "result.json").stat().st_mtime_ns for name in "ab"}
    assert capsys.readouterr().out.count("accuracy") == 2


@pytest.mark.slow
def test_run_made_from_weights_that_are_made_anew_is_made_anew_too(tmp_path):
    small = change(BASE, "train.max_steps=1")
    chosen = config.Suite((("a", small), ("b", change(small, "model.weights=suite:a"))))
    suite.run(chosen, tmp_path)
    (tmp_path / "a" / "result.json").unlink()
    suite.run(chosen, tmp_path)
    assert len(list(tmp_path.glob("b.*"))) == 1  # the old one, moved aside


@pytest.mark.slow
def test_frozen_weights_that_changed_under_a_run_are_noticed(tmp_path):
    first = change(BASE, "train.max_steps=1")
    second = change(first, f"model.weights={tmp_path / 'first'}")
    loop.train(first, tmp_path / "first")
    loop.train(second, tmp_path / "second")
    third = change(first, f"model.weights={tmp_path / 'second'}")
    loop.train(third, tmp_path / "third")
    loop.train(change(first, "train.seed=5"), tmp_path / "first", overwrite=True)
    with pytest.raises(UserError, match="which has changed since"):
        loop.train(third, tmp_path / "fourth")


def test_mistake_in_the_last_member_of_a_suite_is_found_before_the_first_is_trained(tmp_path):
    wrong = change(BASE, 'freeze=train_from("block_9")')
    with pytest.raises(UserError, match="no stage 'block_9'"):
        suite.run(config.Suite((("a", BASE), ("b", wrong))), tmp_path)
    assert not list(tmp_path.iterdir())


def test_suite_member_that_starts_from_a_later_one_is_refused(tmp_path):
    chosen = config.Suite((("b", change(BASE, "model.weights=suite:a")), ("a", BASE)))
    with pytest.raises(UserError, match="no member 'a' comes before it"):
        suite.resolve(chosen, tmp_path)


def test_override_of_one_member_leaves_the_others(tmp_path):
    chosen = config.Suite((("a", BASE), ("b", BASE)))
    changed = dict(suite.override(chosen, ["b.train.epochs=7", "optim.learning_rate=1"]).members)
    assert (changed["a"].train.epochs, changed["b"].train.epochs) == (2, 7)
    assert changed["a"].optim.learning_rate == changed["b"].optim.learning_rate == 1
    with pytest.raises(UserError, match="did you mean 'train'"):
        suite.override(chosen, ["trian.epochs=7"])
