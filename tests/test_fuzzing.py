"""Whatever a user writes, and whatever happens to files: an answer or a UserError, no other exception and no hang."""

import contextlib
import dataclasses
import json
import shutil
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxtl import config
from jaxtl.data import listing, sources
from jaxtl.errors import UserError
from jaxtl.training import checkpoint, freeze, loop, run, suite
from jaxtl.training.network import load_run

EXPERIMENT = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("fc", "cls")),
    data=config.Images(source="digits", train_size=40, eval_size=20),
    freeze=freeze.train_from("block_4"),
    train=config.Train(max_steps=4, batch_size=10, eval_batch_size=20),
    checkpoint=config.Checkpoint(every_steps=2),
)

# Every example makes a file or more: slow on a busy machine, which proves nothing. A hang is ended by the test run.
fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150, derandomize=True)
only_user_errors = contextlib.suppress(UserError)


def fields(node, prefix=""):
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        yield from fields(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]


TEXTS = config.Experiment(model=EXPERIMENT.model, data=config.Text())
PATHS = sorted({*fields(EXPERIMENT), *fields(TEXTS)})
# Values that are nearly right find more than those that are not.
VALUES = st.one_of(
    st.text(max_size=30),
    st.text("0123456789.-+eE_()[]{},'\"= naifNote", max_size=20),
    st.sampled_from(
        ["none", "true", "nan", "inf", "1e400", "-1", "9" * 40, "(" * 500, "[[]]", "{}", "('a', 1)", "\0", "Ⅷ"]
    ),
    st.floats().map(str),
    st.integers().map(str),
)


@given(st.lists(st.tuples(st.one_of(st.sampled_from(PATHS), st.text(max_size=20)), VALUES), max_size=3), st.booleans())
@fuzz
def test_overrides(assignments, images):
    with only_user_errors:
        changed = suite.override(EXPERIMENT if images else TEXTS, [f"{path}={value}" for path, value in assignments])
        # What is accepted can be written, and read again as the same.
        assert config.from_json(config.to_json(changed), "") == changed


STAGES = ("embeddings", *(f"block_{i}" for i in range(1, 5)), "norm", "head")
PARAMS = {f"{stage}/{name}": None for stage in STAGES for name in ("attention/query/kernel", "mlp/fc1/bias", "scale")}
PATTERNS = st.one_of(
    st.sampled_from([*STAGES, ".*", "head..", "block_2..", "..block_3", "block_4..block_2", "..", "", "block_9.."]),
    st.text("block_1234./*()[]?+|\\^$ehad", max_size=12),
    st.text(max_size=8),
)


@given(st.lists(st.tuples(PATTERNS, st.one_of(st.none(), st.text(max_size=5))), max_size=4))
@fuzz
def test_freeze_rules(rules):
    with only_user_errors:
        labels = freeze.label_params(PARAMS, tuple(rules), STAGES)
        assert labels.keys() == PARAMS.keys()
        assert freeze.trained(labels)


@given(st.text(max_size=60))
@fuzz
def test_freeze_rules_as_text(text):
    with only_user_errors:
        suite.override(EXPERIMENT, [f"freeze={text}"])


CELLS = st.text(string.printable + "é😷\0\ufeff\u2028", max_size=12)
TABLES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.lists(CELLS, max_size=4), max_size=8).map(
        lambda rows: "\n".join(["text,label", *(",".join(row) for row in rows)]).encode()
    ),
    st.lists(st.dictionaries(st.sampled_from(["text", "label", "x"]), st.one_of(CELLS, st.integers(), st.none()))).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    ),
)


@given(TABLES, st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet"]), st.booleans())
@fuzz
def test_files_of_texts(content, suffix, labelled):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"train{suffix}").write_bytes(content)
        data = config.Text(dir=folder, train=(f"train{suffix}",), label_column="label" if labelled else "")
        with only_user_errors:
            train, held_out = sources.listings(data)
            assert len(train.labels) == len(train.texts) > 0 < len(held_out.texts)


def image_bytes(mode, size, kind):
    with tempfile.SpooledTemporaryFile() as file:
        Image.new(mode, size).save(file, kind)
        file.seek(0)
        return file.read()


WHOLE = [image_bytes("RGB", (5, 3), "PNG"), image_bytes("L", (1, 1), "PNG"), image_bytes("RGB", (9, 9), "JPEG")]
WHOLE.append(image_bytes("P", (4, 4), "GIF"))
CONTENTS = st.one_of(
    st.sampled_from(WHOLE),
    st.binary(max_size=40),
    st.tuples(st.sampled_from(WHOLE), st.integers(0, 60)).map(lambda both: both[0][: both[1]]),
    st.tuples(st.sampled_from(WHOLE), st.integers(0, 100), st.integers(0, 255)).map(
        lambda all: all[0][: all[1]] + bytes([all[2]]) + all[0][all[1] + 1 :]
    ),
)
NAMES = st.sampled_from(["a", "b", "train", "val", "1", ".x", "ü 😷"])
FILES = st.sampled_from(["1.png", "2.jpg", "3.JPEG", "4.gif", ".png", "x.txt", "Thumbs.db", "ü.png"])


@given(st.dictionaries(st.tuples(st.lists(NAMES, max_size=3).map(tuple), FILES), CONTENTS, max_size=10))
@fuzz
def test_image_folders(tree):
    with tempfile.TemporaryDirectory() as folder:
        for (parents, name), content in tree.items():
            path = Path(folder, *parents, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        data = config.Images(source="folder", dir=folder)
        with only_user_errors:
            drawn = sources.listings(data)
            for split in sources.read(drawn, "stretch", 8, listing.no_progress):
                assert split.inputs.shape == (len(split.labels), *split.inputs.shape[1:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with the checkpoints of its steps 2 and 4, their digests, and that of what it trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(EXPERIMENT, folder)
    known = {}
    for step in (4, 2):
        found = checkpoint.load(folder)
        known[step] = checkpoint.digest(found.params), found.record
        (folder / "checkpoints" / str(step)).rename(folder / f"_{step}")
    for step in (4, 2):
        (folder / f"_{step}").rename(folder / "checkpoints" / str(step))
    return folder, known, checkpoint.digest(load_run(folder).trained)


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 10**6), st.sampled_from(["cut", "flip", "delete", "insert", "fill"]), st.integers(0, 10**6)
    ),
    min_size=1,
    max_size=3,
)


def damage(folder, part, changes):
    for which, kind, where in changes:
        paths = sorted(path for path in (folder / part).rglob("*") if path.is_file())
        path = paths[which % len(paths)]
        content = bytearray(path.read_bytes())
        where %= len(content) + 1
        if kind == "delete" and len(paths) > 1:
            path.unlink()
            continue
        if kind == "cut":
            del content[where:]
        elif kind == "flip" and where < len(content):
            content[where] ^= 1 << which % 8
        elif kind == "insert":
            content[where:where] = b"\xff{"
        else:
            content[where:] = bytes(len(content) - where)
        path.write_bytes(content)


@given(CHANGES)
@settings(fuzz, max_examples=60)
def test_checkpoint_folders(trained, changes):
    folder, known, _ = trained
    with tempfile.TemporaryDirectory() as place, only_user_errors:
        copy = shutil.copytree(folder, Path(place) / "run")
        damage(copy, "checkpoints", changes)
        found = checkpoint.load(copy)
        assert (checkpoint.digest(found.params), found.record) == known[found.step]


@given(CHANGES)
@settings(fuzz, max_examples=40)
def test_folders_of_finished_runs(trained, changes):
    folder, _, digest = trained
    with tempfile.TemporaryDirectory() as place, only_user_errors:
        copy = shutil.copytree(folder, Path(place) / "run")
        damage(copy, "trained", changes[:1])
        for name, change in zip(("result.json", "experiment.json"), changes[1:], strict=False):
            (copy / "one").mkdir()
            (copy / name).rename(copy / "one" / name)
            damage(copy, "one", [change])
            (copy / "one" / name).rename(copy / name)
            (copy / "one").rmdir()
        run.finished(copy, EXPERIMENT, overwrite=False)
        assert checkpoint.digest(load_run(copy).trained) == digest
