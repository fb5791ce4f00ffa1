"""The export command: what it writes, where, and what it refuses."""

import errno
import os
import shutil
from collections import namedtuple

import pytest

from jaxtl import config, export, storage
from jaxtl.exporting import huggingface
from jaxtl.training import loop
from jaxtl.training.network import load_run


@pytest.fixture(scope="module")
def folder(bert_folder, text_folder, tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("export") / "tweets"
    experiment = config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=config.Head("fc", "cls", init="random")),
        data=config.Text(
            dir=str(text_folder), train=("train.csv",), validation="val.csv", max_length=40, buckets=1, train_size=16
        ),
        freeze=(("head..", "head"), (".*", None)),
        train=config.Train(max_steps=1, batch_size=16, eval_batch_size=16),
        reported=(("accuracy", 0.9), ("f1/real", 0.8)),
    )
    loop.train(experiment, folder)
    return folder


def test_trained_run_becomes_a_folder_of_either_format(folder, command, tmp_path, read_json):
    status, shown, told = command(export, folder, tmp_path / "new" / "hf")
    assert (status, told) == (0, "")
    assert shown == f"{tmp_path / 'new' / 'hf' / 'README.md'}\n"
    assert {path.name for path in (tmp_path / "new" / "hf").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]
    status, shown, _ = command(export, folder, tmp_path / "jax", "--format=stablehlo")
    assert status == 0
    assert {path.name for path in (tmp_path / "jax").iterdir()} == {
        "README.md", "model.jax_export", "signature.json", "tokenizer"
    }  # fmt: skip
    result = read_json(folder / "result.json")
    for made in ("new/hf", "jax"):
        card = (tmp_path / made / "README.md").read_text()
        assert f"| held out | 60 | {result['held_out']['accuracy']:.4f} |" in card
        assert "| f1/real |" in card  # beside the published figure
        for file in (tmp_path / made).rglob("*"):
            assert file.stat().st_mode & 0o777 == (file.parent.stat().st_mode & (0o777 if file.is_dir() else 0o666))


def test_run_that_went_on_from_exported_weights_starts_from_them(folder, command, tmp_path):
    """model.weights=FOLDER, through the same reader as any checkpoint."""
    assert command(export, folder, tmp_path / "hf")[0] == 0
    again = load_run(folder).experiment
    from dataclasses import replace

    from jaxtl.training.network import initial_params, network, run_params

    model = replace(again.model, weights=str(tmp_path / "hf"))
    net = network(replace(again, model=model), 2, tmp_path / "hf")
    start = initial_params(net, model, tmp_path / "hf", seed=3)
    _, params = run_params(load_run(folder))
    for path, value in params.items():
        assert path.startswith("head/") or (value == start[path]).all()


def test_mistakes_are_one_line_and_leave_nothing_behind(folder, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    mistakes = [
        ((folder,), "give a run folder and the folder to write"),
        ((folder, "a", "b"), "give a run folder and the folder to write"),
        (("nowhere", "out"), "nowhere holds no run"),
        (("empty", "out"), "empty holds no run"),
        (("unfinished", "out"), "has not finished; run it first"),
        ((folder, "taken"), "taken is not empty: give another name, or --overwrite"),
        ((folder, "file"), "file is a file: give the name of a folder"),
        ((folder, "file/out"), "file/out cannot be written: "),
        ((folder, folder), "is the run itself"),
        (("unfinished", ".", "--overwrite"), "is the run itself, or holds it"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in mistakes:
        status, shown, told = command(export, *arguments)
        assert (status, shown) == (2, ""), arguments
        assert message in told, told
        assert told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_format_is_told_with_the_known_ones(capsys):
    from jaxtl.cli import parser

    with pytest.raises(SystemExit) as ended:
        parser(export)(["jaxtl", "run", "out", "--format=onnx"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "huggingface" in told
    assert "stablehlo" in told
    assert told.count("\n") == 1


def test_overwriting_moves_the_old_folder_aside(folder, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert command(export, folder, tmp_path / "out", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "config.json").is_file()
    (aside,) = (path for path in tmp_path.iterdir() if path.name != "out")
    assert aside.name.startswith("out.")
    assert (aside / "mine").read_text() == "mine"


def test_empty_folder_is_filled_and_what_a_killed_process_left_is_cleared(folder, command, tmp_path):
    (tmp_path / "out").mkdir()
    left, others = tmp_path / ".out.0a1b2c3d.tmp", tmp_path / ".out.4e5f6a7b.tmp"
    for unfinished in (left, others):
        unfinished.mkdir()
        (unfinished / "half").write_text("half")
    os.utime(left, (0, 0))
    assert command(export, folder, tmp_path / "out")[0] == 0
    assert sorted(tmp_path.iterdir()) == [others, tmp_path / "out"]  # another process may be at work on that one
    assert not (tmp_path / "out" / "half").exists()


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_full_disk_is_one_line_and_leaves_nothing(when, folder, command, tmp_path, monkeypatch):
    if when == "before":
        usage = namedtuple("usage", "total used free")(10**6, 10**6 - 100, 100)
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    else:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(huggingface, "save_file", full)
    status, _, told = command(export, folder, tmp_path / "out")
    assert status == 2
    assert ("GB free: make room" if when == "before" else "No space left on device") in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())
