"""The command as people type it: its exit status, and one line for each mistake."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax._src.lru_cache import LRUCache
from PIL import Image

from jaxtl import cli, main
from jaxtl.errors import UserError
from jaxtl.models import presets
from jaxtl.training import suite
from jaxtl.weights import convert, tables

NANO = """
from jaxtl.config import Images, Experiment, Head, Model, Train


def experiment():
    return Experiment(
        Model("vit_nano_patch2_8", image_size=8, head=Head("fc", "cls")),
        Images(source="digits", train_size=40, eval_size=20),
        train=Train(batch_size=20, eval_batch_size=20),
    )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder of one's own, with one small experiment in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano.py").write_text(NANO)
    return tmp_path


def run(*arguments):
    """Runs the command in this process; mistakes come as UserError."""
    assert suite  # imported before the flags are saved: grain defines flags too, which must not be taken back
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        main.run(flags.FLAGS(["jaxtl", *arguments]))


def shell(*arguments, **environment):
    """Runs the command as a process of its own."""
    # What the command has set for itself in this process, in other tests, is not for others.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    return subprocess.run(
        [sys.executable, "-m", "jaxtl.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
    )


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts}


MISTAKES = {
    "unknown experiment": (["--experiment=quickstrat"], "no experiment 'quickstrat' (did you mean 'quickstart'?)"),
    "no experiment": ([], "--experiment=NAME is missing; --list shows the names"),
    "file that is not there": (["--experiment=mine/x.py"], "there is no file mine/x.py"),
    "word that is no flag": (["quickstart"], "what is 'quickstart'?"),
    "unknown field": (["--experiment=nano.py", "--set=train.epoch=3"], "did you mean 'epochs'"),
    "value of the wrong type": (["--experiment=nano.py", "--set=train.epochs=x"], "expected a whole number"),
    "value out of range": (["--experiment=nano.py", "--set=train.epochs=0"], "must be greater than zero"),
    "unknown preset": (["--experiment=nano.py", "--set=model.preset=vgg91"], "(did you mean 'vgg19'?)"),
    "unknown stage": (["--experiment=nano.py", '--set=freeze=train_from("block_9")'], "no stage 'block_9'"),
    "missing data folder": (
        ["--experiment=nano.py", "--set=data.source=auto", "--set=data.dir=nowhere"],
        "data.dir=nowhere is not a folder",
    ),
    "missing weights": (["--experiment=nano.py", "--set=model.weights=./nowhere"], "no such file or folder"),
    "weights without config": (["--experiment=nano.py", "--set=model.weights=empty"], "config.json is missing"),
    "weights of another width": (
        ["--experiment=nano.py", "--set=model.weights=tiny"],
        "tiny are not those of vit_nano_patch2_8: width 192 against 64",
    ),
    "weights of another architecture": (["--experiment=nano.py", "--set=model.weights=gpt"], "describes 'gpt2'"),
    "config without weights": (["--experiment=nano.py", "--set=model.weights=bare"], "model.safetensors"),
    "image size that does not fit": (["--experiment=nano.py", "--set=model.image_size=9"], "patch size 2: 8 or 10"),
    "folder with one class": (
        ["--experiment=nano.py", "--set=data.source=folder", "--set=data.dir=one_class"],
        "two classes or more",
    ),
    "broken images": (
        ["--experiment=nano.py", "--set=data.source=folder", "--set=data.dir=broken", "--set=data.train_size=none",
         "--set=data.eval_size=none"],
        "unreadable images (2)",
    ),
    "workdir that holds other things": (["--experiment=nano.py", "--workdir=tiny"], "holds files but no run"),
    "experiment that does not work": (["--experiment=wrong.py"], "wrong.py:1: ModuleNotFoundError"),
    "value misspelt in a file": (["--experiment=adamW.py"], "optim: name: 'adamW' is none of adam, adamw, sgd"),
    "file whose function fails": (["--experiment=fails.py"], "fails.py:2: KeyError: 'x'"),
    "workdir below a file": (["--experiment=nano.py", "--workdir=nano.py/x"], "nano.py is not a folder"),
    "no weights named": (["--experiment=nano.py", "--set=model.weights="], "must be a path, a repository or random"),
    "experiment without its function": (["--experiment=hollow.py"], "defines a function experiment()"),
}  # fmt: skip


@pytest.fixture
def mistaken(here):
    """What the mistakes are made with."""
    for name, fields in {
        "tiny": '{"model_type": "vit", "hidden_size": 192}',
        "gpt": '{"model_type": "gpt2"}',
        "bare": '{"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, '
        '"intermediate_size": 256, "patch_size": 2, "image_size": 8}',
    }.items():
        (here / name).mkdir()
        (here / name / "config.json").write_text(fields)
    (here / "empty").mkdir()
    (here / "wrong.py").write_text("import nothing_of_this_name\n")
    (here / "hollow.py").write_text("experiment = 3\n")
    (here / "fails.py").write_text("def experiment():\n    return {}['x']\n")
    (here / "adamW.py").write_text(
        NANO.replace("train=", 'optim=Optim("adamW"), train=').replace("Model,", "Model, Optim,")
    )
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for name in ("one_class/train/cat", "one_class/val/cat", "broken/cat", "broken/dog"):
        (here / name).mkdir(parents=True)
        for index in range(10):
            image.save(here / name / f"{index}.png")
    (here / "broken/cat/0.png").write_bytes(b"not an image")
    whole = (here / "broken/dog/1.png").read_bytes()
    (here / "broken/dog/1.png").write_bytes(whole[: len(whole) // 2])
    return here


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_clear_line_and_leaves_nothing_behind(mistaken, mistake):
    arguments, message = MISTAKES[mistake]
    before = files(mistaken)
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert files(mistaken) == before


def test_broken_images_are_all_named(mistaken):
    with pytest.raises(UserError) as error:
        run(*MISTAKES["broken images"][0])
    assert "cat/0.png" in str(error.value)
    assert "dog/1.png" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment=quickstrat"], "jaxtl: error: no experiment 'quickstrat' (did you mean 'quickstart'?)"),
        (["--experimnet=quickstart"], "jaxtl: error: there is no flag --experimnet (did you mean 'experiment'?)"),
        (["--list=perhaps"], "jaxtl: error: flag --list=perhaps"),
    ],
)
def test_mistake_is_status_2_and_one_line_on_standard_error(arguments, message):
    done = shell(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_without_a_network_the_weights_to_fetch_and_where_to_put_them_are_named(here):
    done = shell(
        "--experiment=dinov2_cifar10", "--set=data.source=digits", "--set=data.name=", "--set=data.train_size=40",
        "--set=data.eval_size=20", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(here / "hub"),
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("jaxtl: error")]
    assert "facebook/dinov2-small" in line
    assert "--set model.weights=DIR" in line
    assert not (here / "runs").exists()


def test_help_shows_our_flags_first():
    done = shell("--help")
    assert "--experiment" in done.stdout
    assert "--set" in done.stdout
    assert done.stdout.index("--experiment") < done.stdout.index("--helpfull")


def test_list_names_every_experiment_and_its_expected_result(capsys):
    run("--list")
    shown = capsys.readouterr().out
    for name in (
        "deit_cifar10",
        "deit_cifar10_lastblock",
        "vgg19_cifar10",
        "vit_cifar10",
        "dinov2_cifar10",
        "quickstart",
    ):
        assert f" {name} " in shown
    assert "0.967" in shown


def test_explain_shows_stages_data_and_plan_and_writes_nothing(here, capsys):
    before = files(here)
    run("--experiment=nano.py", "--explain", '--set=freeze=train_from("block_4")', "--set=train.epochs=3")
    shown = capsys.readouterr().out
    assert "40 training, 20 held-out examples; 10 classes" in shown
    assert "6 steps of 20 examples (3 epochs of 2)" in shown
    assert "stages up to block_3 run once, cached" in shown
    # 12 D^2 + 13 D with D = 64
    assert "49,984" in shown
    assert files(here) == before


def test_explain_for_programs_is_json_alone(here, capsys):
    run("--experiment=nano.py", "--explain=json", '--set=freeze=train_from("block_4")')
    assert json.loads(capsys.readouterr().out)["plan"]["boundary"] == "block_3"


@pytest.mark.slow
def test_programs_are_compiled_once_for_all_runs(here):
    def programs():
        return {path.name for path in (here / "cache" / "programs").glob("*-cache")}

    settings = {"JAXTL_CACHE": str(here / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert shell("--experiment=nano.py", "--workdir=one", **settings).returncode == 0
    kept = programs()
    assert kept
    assert shell("--experiment=nano.py", "--workdir=two", "--set=train.seed=1", **settings).returncode == 0
    assert programs() == kept


def test_program_that_was_half_written_does_not_keep_others_from_being_kept(tmp_path, monkeypatch):
    """JAX looks for the second half of every program before it writes another."""
    folder = tmp_path / "programs"
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXTL_CACHE", str(tmp_path))
    kept = LRUCache(str(folder), max_size=2**20)
    kept.put("whole", b"1")
    for name in ("half", "on_its_way"):
        (folder / f"{name}-cache").write_bytes(b"2")
    os.utime(folder / "half-cache", (0, 0))
    cli._keep_programs()
    assert {path.name for path in folder.glob("*-cache")} == {"whole-cache", "on_its_way-cache"}
    (folder / "on_its_way-atime").write_bytes(bytes(8))
    kept.put("other", b"3")
    assert kept.get("other") == b"3"
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]


def test_folder_of_programs_that_the_user_has_named_is_left_to_jax(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    (tmp_path / "theirs-cache").write_bytes(b"1")
    os.utime(tmp_path / "theirs-cache", (0, 0))
    cli._keep_programs()
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
    assert (tmp_path / "theirs-cache").exists()


@pytest.mark.parametrize(("chosen", "shown"), [((), "lengths of batches"), (("data.buckets=3",), "at most 3 lengths")])
def test_explain_of_texts_says_how_lengths_are_chosen_before_there_is_a_tokenizer(here, capsys, chosen, shown):
    (here / "texts.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(20)))
    changes = ["model.preset=minilm_l6", "model.weights=org/not-here", "data.train=texts.csv", *chosen]
    run("--experiment=text_csv", "--explain", *(f"--set={change}" for change in changes))
    table = " ".join(capsys.readouterr().out.split())
    assert shown in table
    assert ("at most" in table) == bool(chosen)


def test_explain_of_an_experiment_on_the_hub_needs_no_network(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("--experiment=dinov2_cifar10", "--explain", "--set=data.source=digits", "--set=data.train_size=40",
        "--set=data.eval_size=20")  # fmt: skip
    assert "1,877,130" in capsys.readouterr().out


@pytest.mark.slow
def test_run_is_reported_when_the_command_is_given_again_and_repeated_from_its_experiment_json(here, capsys):
    run("--experiment=nano.py")
    first = capsys.readouterr().out
    run("--experiment=nano.py")
    again = capsys.readouterr().out
    assert "finished before" in again
    assert "finished before" not in first
    run("--experiment=runs/nano/experiment.json")
    repeated = here / "runs" / "nano-again"
    import json

    results = [json.loads((folder / "result.json").read_text()) for folder in (here / "runs" / "nano", repeated)]
    assert results[0]["loss"] == results[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_cifar10", "vgg19_cifar10"])
def test_study_experiment_runs_end_to_end_on_real_cifar10_with_random_weights(here, cifar10, name):
    run(f"--experiment={name}", f"--set=data.dir={cifar10}", "--set=model.weights=random", "--set=train.max_steps=2",
        "--set=train.batch_size=4", "--set=data.eval_size=20", "--set=train.eval_batch_size=4")  # fmt: skip
    import json

    result = json.loads((here / "runs" / name / "result.json").read_text())
    assert result["trainable_parameters"] == result["reported"]["trainable_parameters"]
    assert (result["steps"], result["train_examples"], result["eval_examples"]) == (2, 5_000, 20)
    assert np.isfinite(result["loss"])


def test_experiment_in_the_current_folder_hides_an_installed_one(here, capsys):
    (here / "experiments").mkdir()
    (here / "experiments" / "quickstart.py").write_text('"""Mine.\n\nExpected: nothing."""\n' + NANO)
    run("--list")
    assert "Mine." in capsys.readouterr().out


def test_local_folder_of_weights_is_used(here):
    """Nothing before the head learns: what is in the checkpoint must show in the result, as random weights do not."""
    import json

    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from jaxtl.models import stages

    config = presets.PRESETS["vit_nano_patch2_8"]
    _, targets, _ = stages.abstract(lambda rngs: presets.backbone(config, top=None, dtype=jnp.float32, rngs=rngs))
    random = np.random.default_rng(0)
    params = {path: random.standard_normal(leaf.shape).astype(np.float32) for path, leaf in targets.items()}
    (here / "weights").mkdir()
    written = convert.write(tables.table(config, top=None), params, prefix="vit.")
    save_file(written, here / "weights" / "model.safetensors")
    fields = dict(model_type="vit", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
                  patch_size=2, image_size=8)  # fmt: skip
    (here / "weights" / "config.json").write_text(json.dumps(fields))
    arguments = ["--experiment=nano.py", "--set=freeze=train_head_only()"]
    run(*arguments, "--workdir=random")
    run(*arguments, "--workdir=loaded", "--set=model.weights=weights", "--set=model.preset=from_weights")
    losses = [json.loads((here / name / "result.json").read_text())["loss"] for name in ("random", "loaded")]
    assert losses[0] != losses[1]
