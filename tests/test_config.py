"""Overrides, validation and the JSON form of experiments."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtl import config, experiments
from jaxtl.errors import UserError
from jaxtl.training import freeze

BASE = config.Experiment(config.Model("vgg19"), config.Images())


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("train.epochs=2", lambda e: e.train.epochs, 2),
        ("optim.learning_rate=3e-4", lambda e: e.optim.learning_rate, 3e-4),
        ("model.weights=a=b", lambda e: e.model.weights, "a=b"),
        ("model.head.hidden=7", lambda e: e.model.head.hidden, 7),
        ("data.train_size=10", lambda e: e.data.train_size, 10),
        ("data.train_size=none", lambda e: e.data.train_size, None),
        ("data.download=false", lambda e: e.data.download, False),
        ("data.classes=cat, dog", lambda e: e.data.classes, ("cat", "dog")),
        ('freeze=train_from("block5_conv1")', lambda e: e.freeze, freeze.train_from("block5_conv1")),
        ('optim.multipliers=[("head", 10)]', lambda e: e.optim.multipliers, (("head", 10.0),)),
        ("train.precision=bfloat16", lambda e: e.train.precision, "bfloat16"),
    ],
)
def test_override_replaces_one_field_by_its_type(assignment, read, value):
    changed = config.override(BASE, [assignment])
    assert read(changed) == value
    assert config.differences(BASE, changed) == ([] if value is None else [assignment.partition("=")[0]])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epoch=2", "did you mean 'epochs'"),
        ("trian.epochs=2", "did you mean 'train'"),
        ("train.epochs=two", "expected a whole number"),
        ("train.epochs=2.5", "expected a whole number"),
        ("optim.learning_rate=fast", "expected a number"),
        ("train.precision=float16", "expected one of float32, bfloat16"),
        ("data.download=maybe", "expected true or false"),
        ("train=3", "this is a group of fields; set one of train.epochs"),
        ("train.epochs.x=3", "train.epochs has no fields below it"),
        ("train.epochs", "write it as path.to.field=value"),
        ("freeze=block_12", "expected one of train_all"),
        ("optim.multipliers=head", "expected pairs"),
    ],
)
def test_override_that_cannot_be_meant_says_what_would_be(assignment, message):
    with pytest.raises(UserError) as error:
        config.override(BASE, [assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_is_applied_or_a_user_error(path, text):
    try:
        changed = config.override(BASE, [f"{path}={text}"])
    except UserError:
        return
    assert isinstance(changed, config.Experiment)


FIELDS = [f"{group}.{field.name}" for group in ("model", "data", "optim", "train", "plan")
          for field in dataclasses.fields(getattr(BASE, group)) if field.name != "head"]  # fmt: skip


@given(st.sampled_from([*FIELDS, "freeze", "reported", "model.head.kind"]), st.text(max_size=30))
def test_any_value_of_a_real_field_is_applied_or_a_user_error(path, text):
    try:
        changed = config.override(BASE, [f"{path}={text}"])
    except UserError:
        return
    assert config.from_json(config.to_json(changed), "here") == changed or "nan" in text.lower()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs=0", "train.epochs=0 must be greater than zero"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan must be greater than zero"),
        ("optim.warmup=1", "optim.warmup=1.0 must be at least 0 and below 1"),
        ("data.eval_fraction=0", "must be above 0 and below 1"),
        ("train.seed=-1", "train.seed=-1 must be from 0 to 4294967295"),
    ],
)
def test_values_out_of_range_are_named(assignment, message):
    with pytest.raises(UserError) as error:
        config.validate(config.override(BASE, [assignment]))
    assert message in str(error.value)


def test_all_values_out_of_range_are_named_at_once():
    with pytest.raises(UserError, match=r"train.epochs.*train.batch_size"):
        config.validate(config.override(BASE, ["train.epochs=0", "train.batch_size=0"]))


@pytest.mark.parametrize("path", experiments.available_files(), ids=lambda path: path.stem)
def test_every_experiment_survives_json_is_valid_and_says_what_to_expect(path):
    found = experiments.load(path.stem)
    members = found.members if isinstance(found, config.Suite) else ((path.stem, found),)
    for _, experiment in members:
        assert config.from_json(config.to_json(experiment), "here") == experiment
        config.validate(experiment)
    what, expected = next((what, expected) for name, what, expected in experiments.describe_all() if name == path.stem)
    assert what
    assert expected
    assert re.search(f"--(experiment|suite)={path.stem}\\b", path.read_text())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3, "data": {}}', '{"model": {"preset": "x", "size": 1}}'])
def test_json_that_is_no_experiment_is_a_user_error(text):
    with pytest.raises(UserError, match=r"runs/x is not an experiment"):
        config.from_json(text, "runs/x")
