"""Suites and seeds: which runs there are, what they start from and share, and the comparison they end with."""

import pytest

from jaxtl import config, experiments, main
from jaxtl.errors import UserError
from jaxtl.training import loop, suite

SMALL = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("fc", "cls", dropout=0.0)),
    data=config.Images(source="digits", train_size=40, eval_size=20),
    train=config.Train(epochs=2, batch_size=20, eval_batch_size=20),
)


def change(experiment, *assignments):
    return config.override(experiment, assignments)


# --- seeds -------------------------------------------------------------------------------------------------


def test_repetitions_have_the_seeds_that_follow_and_start_from_that_of_their_own():
    chosen = config.Suite(
        (("a", change(SMALL, "train.seed=5")), ("b", change(SMALL, "model.weights=suite:a", "optim.width=3")))
    )
    found = suite.repeated(chosen, 3, "")
    assert [(name, member.train.seed, member.model.weights) for name, member in found.members] == [
        ("a", 5, "random"), ("b", 0, "suite:a"),
        ("a-seed6", 6, "random"), ("b-seed1", 1, "suite:a-seed6"),
        ("a-seed7", 7, "random"), ("b-seed2", 2, "suite:a-seed7"),
    ]  # fmt: skip
    first, other = dict(found.members)["b"], dict(found.members)["b-seed2"]
    assert config.differences(first, other) == ["model.weights", "train.seed"]


def test_a_single_experiment_with_seeds_is_a_suite():
    found = suite.repeated(SMALL, 2, "nano")
    assert [name for name, _ in found.members] == ["nano", "nano-seed1"]
    assert dict(found.members)["nano"] == SMALL


def test_repetitions_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="two members would be called a-seed1"):
        suite.repeated(config.Suite((("a", SMALL), ("a-seed1", SMALL))), 2, "")
    with pytest.raises(UserError, match=r"train\.seed=4294967296 must be"):
        suite.repeated(change(SMALL, "train.seed=4294967295"), 2, "a")


# --- the study's suites ------------------------------------------------------------------------------------


def test_suites_of_the_study_hold_its_experiments():
    members = {name: dict(experiments.load(name).members) for name in ("covid", "cifar10", "all")}
    assert len(members["covid"]) == 6
    assert list(members["cifar10"]) == ["vgg19_cifar10", "deit_cifar10", "deit_cifar10_lastblock"]
    assert members["all"] == members["covid"] | members["cifar10"]
    for name, experiment in members["all"].items():
        assert experiment == experiments.load(name)
        assert experiment.reported
    # Judged on the same examples, or they could not be tested against each other.
    assert len({member.data for member in members["cifar10"].values()}) == 1
    assert len({member.data for member in members["covid"].values()}) == 1


# --- the command -------------------------------------------------------------------------------------------

SUITE = """
from jaxtl.config import Experiment, Head, Images, Model, Suite, Train
from jaxtl.training.freeze import train_head_only


def experiment():
    data = Images(source="digits", train_size=40, eval_size=20)
    member = Experiment(
        Model("vit_nano_patch2_8", image_size=8, head=Head("fc", "cls", dropout=0.0), weights="pretrained"),
        data,
        freeze=train_head_only(),
        train=Train(epochs=2, batch_size=20, eval_batch_size=20),
    )
    return Suite((("first", member),))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own, with a suite in it and an experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text(SUITE)
    (tmp_path / "single.py").write_text(
        SUITE.replace('return Suite((("first", member),))', "return member").replace(', weights="pretrained"', "")
    )
    return tmp_path


@pytest.mark.slow
def test_suite_with_seeds_runs_what_is_missing_shares_caches_and_ends_with_the_comparison(
    here, command, comparisons, read_json
):
    loop.train(change(SMALL, "train.max_steps=1"), here / "pretrained")
    arguments = ("--suite=digits.py", "--workdir=runs", f"--set=plan.cache_dir={here / 'kept'}")
    status, out, _ = command(main, *arguments, "--seeds=2")
    assert status == 0
    folders = [here / "runs" / name for name in ("first", "first-seed1")]
    # The frozen stages start from the same weights, whatever the seed.
    assert [read_json(folder / "result.json")["cache"] for folder in folders] == ["computed", "loaded"]
    assert [read_json(folder / "experiment.json")["train"]["seed"] for folder in folders] == [0, 1]
    assert out.splitlines()[-1] == "runs/compare.html"
    assert "seeds 0, 1 of first" in out
    assert "seeds 0, 1 of first" in (here / "runs" / "compare.html").read_text(encoding="utf-8")
    stamps = [(folder / "result.json").stat().st_mtime_ns for folder in folders]

    status, again, err = command(main, *arguments, "--seeds=2")  # shows the comparison again
    assert (status, again) == (0, out)
    assert "compiled" not in err
    status, out, err = command(main, *arguments, "--seeds=3")
    assert "seeds 0, 1, 2 of first" in out
    assert err.count("compiled") == 1
    assert [(folder / "result.json").stat().st_mtime_ns for folder in folders] == stamps


def test_single_experiment_with_seeds_has_a_folder_of_its_own(here, command, monkeypatch):
    ran = []
    monkeypatch.setattr(suite, "run", lambda chosen, workdir, overwrite: ran.append((chosen, str(workdir))))
    command(main, "--experiment=single.py", "--seeds=2", "--seed=3")
    command(main, "--experiment=single.py", "--seeds=2", "--workdir=mine")
    command(main, "--experiment=single.py", "--seeds=1")
    assert [workdir for _, workdir in ran] == ["runs/single-seeds", "mine", "runs/single"]
    assert [(name, member.train.seed) for name, member in ran[0][0].members] == [("single", 3), ("single-seed4", 4)]
    assert isinstance(ran[2][0], config.Experiment)


def test_explain_of_a_suite_with_seeds_describes_each_member_once(here, command):
    status, out, _ = command(main, "--experiment=single.py", "--seeds=3", "--explain")
    assert status == 0
    assert out.count("trained parameters") == 1
    assert out.splitlines()[-1] == "with --seeds=3: single, single-seed1, single-seed2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=single.py"], "single.py is a single experiment, not a suite: --experiment=single.py"),
        (["--suite=digits.py", "--experiment=digits.py"], "give one of them"),
        (["--suite=covd"], "no experiment 'covd' (did you mean 'covid'?)"),
        (["--suite=digits.py", "--seeds=0"], "--seeds=0"),
        (["--suite=digits.py", "--mode=eval"], "without --explain, --overwrite, --suite and --seeds"),
    ],
)
def test_mistake_is_one_line(here, arguments, message):
    from absl import flags
    from absl.testing import flagsaver

    before = sorted(here.rglob("*"))
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        with pytest.raises((UserError, flags.Error)) as error:
            main.run(flags.FLAGS(["jaxtl", *arguments]))
    assert message in str(error.value)
    assert sorted(here.rglob("*")) == before
