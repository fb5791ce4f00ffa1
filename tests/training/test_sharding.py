"""The same run on one device and on many, and what travels between them."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtl import config
from jaxtl.errors import UserError
from jaxtl.training import checkpoint, loop, sharding

IMAGES = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=256, dropout=0.5)),
    data=config.Images(source="digits", train_size=80, eval_size=48),
    optim=config.Optim("adamw", learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
    train=config.Train(epochs=2, batch_size=32, eval_batch_size=16, log_every=1),
)
# Whole, and divided: (devices, fsdp).
FEW, SOME = ((1, 1), (2, 1), (4, 2)), ((1, 1), (2, 2), (8, 1))
MANY = ((1, 1), (2, 2), (8, 1), (8, 8))
EVERYTHING, LAST, HEAD = "freeze=train_all()", 'freeze=train_from("block_4")', "freeze=train_head_only()"
SLOW = pytest.mark.slow


def divided_from(experiment):
    """From how many elements on a parameter is divided: of a BERT as small as that of the tests, none would be."""
    return 512 if isinstance(experiment.data, config.Text) else sharding.DIVIDED_FROM


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("images", FEW, EVERYTHING), id="images"),
        pytest.param(("images", SOME, LAST, "data.augment=crop_flip", "train.accumulate_steps=2"), marks=SLOW),
        pytest.param(("images", MANY, LAST), marks=SLOW),  # cached
        pytest.param(("images", SOME, HEAD, "plan.cache=off"), marks=SLOW),
        pytest.param(("texts", SOME, EVERYTHING, "data.buckets=1"), marks=SLOW),
        pytest.param(("texts", MANY, 'freeze=train_from("layer_2")'), marks=SLOW),  # cached, without padding
    ],
)
def runs(request, tmp_path_factory, bert_folder, text_folder):
    """(experiment, layout -> run folder) of the same experiment on several numbers of virtual devices."""
    kind, layouts, *changes = request.param
    folder, experiment = tmp_path_factory.mktemp("devices"), IMAGES
    if kind == "texts":
        data = config.Text(
            dir=str(text_folder), train=("train.csv",), max_length=40, buckets=2, train_size=80, eval_size=48
        )
        model = config.Model("from_weights", str(bert_folder), head=config.Head("bigru", "sequence", 32, dropout=0.3))
        experiment = config.Experiment(model, data, optim=IMAGES.optim, train=IMAGES.train)
    experiment, found, jobs = config.override(experiment, changes), {}, []
    for devices, fsdp in layouts:
        found[devices, fsdp] = folder / f"{devices}-{fsdp}"
        path = folder / f"{devices}-{fsdp}.json"
        divided = config.override(experiment, [f"parallel.devices={devices}", f"parallel.fsdp={fsdp}"])
        path.write_text(config.to_json(divided))
        jobs.append((str(path), str(found[devices, fsdp])))
    (folder / "jobs.json").write_text(json.dumps([divided_from(experiment), jobs]))
    # Compiled for a few steps: the less is done about it, the sooner it is over.
    xla = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = {"XLA_FLAGS": xla, "JAXTL_CACHE": str(folder / "cache")}
    program = [sys.executable, Path(__file__).with_name("on_devices.py"), folder / "jobs.json"]
    ended = subprocess.run(program, env={**os.environ, **flags}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return experiment, found


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines])


def test_every_number_of_devices_gives_the_same_run(runs):
    """The same examples, dropout and augmentation; sums in another order.

    A float32 sum is off by some 1e-7 of it; a step passes that on, and Adam divides it by gradients that may be as
    small: of the few entries that have such gradients, an update is off by more. A device left out, or counted twice,
    changes losses and all parameters in the first digit.
    """
    experiment, found = runs
    folder = found.pop((1, 1))
    one, before = checkpoint.load(folder), loop._prepare(experiment, None).state.params
    moved = max(np.abs(one.params[path] - before[path]).max() for path in before)
    for layout, other in found.items():
        np.testing.assert_allclose(losses(other), losses(folder), rtol=1e-5, err_msg=layout)
        params = checkpoint.load(other).params
        for path, value in one.params.items():
            if not path.endswith("attention/key/bias"):  # softmax takes away what it adds: its gradient is rounding
                off = np.abs(params[path] - value) / moved
                assert np.sqrt(np.mean(off**2)) < 2e-4, (layout, path)
                assert off.max() < 2e-2, (layout, path)
    found[1, 1] = folder


def collectives(text):
    """Returns the elements that each kind of collective of compiled programs works on."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = {}
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found[kind] = found.get(kind, 0) + sum(sizes)
    return found


def test_gradients_of_trainable_leaves_alone_are_reduced_and_once(runs):
    experiment, found = runs
    if experiment.train.accumulate_steps > 1 or isinstance(experiment.data, config.Text):
        pytest.skip("a loop's body, or the steps of several lengths, are counted several times")
    trained = sum(x.size for x in loop._prepare(experiment, None).state.params.values())
    for (devices, fsdp), folder in found.items():
        moved = collectives(Path(f"{folder}.programs").read_text())
        if devices == 1:
            assert not moved
        elif fsdp == 1:
            # Beside the gradients, the sums of losses, of right answers, of answers and of examples. The key's bias of
            # the last block, 64 numbers, has none: the head's token asks without it. Its first norm meets that token in
            # three places with its scale and in two with its bias, each with a sum of its own.
            assert trained - 64 <= moved["all-reduce"] <= trained + 3 * 64 + 16
            assert moved.keys() <= {"all-reduce", "all-gather"}
            # Answers of an evaluation, and activations that are kept, come together: of a batch.
            widest = experiment.train.eval_batch_size * 17 * 64
            assert moved.get("all-gather", 0) <= 2 * widest


def test_divided_parameters_take_a_part_of_the_memory(runs):
    """And so does the optimiser's state for them."""
    experiment, found = runs
    for (_, fsdp), folder in found.items():
        sizes = json.loads(Path(f"{folder}.sizes.json").read_text())
        least = divided_from(experiment)
        large = [(whole, part) for whole, part in sizes if whole >= least]
        assert large
        assert all(part * fsdp == whole for whole, part in large)
        assert all(part == whole for whole, part in sizes if whole < least)


def test_run_goes_on_with_another_number_of_devices(runs, tmp_path):
    """A checkpoint holds whole arrays: this process, with one device, reads those of several."""
    experiment, found = runs
    layout = max(found)
    saved = checkpoint.load(found[layout])
    like = loop._prepare(experiment, None).state
    state = saved.state(like)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, like)
    divided = config.override(experiment, [f"parallel.devices={layout[0]}", f"parallel.fsdp={layout[1]}"])
    assert all(name.startswith("parallel.") for name in config.differences(experiment, divided))
    assert loop.train(experiment, found[layout])["steps"] == 6  # not refused as one with other settings


def test_largest_axis_that_divides_is_the_one_divided():
    assert sharding.spec((768, 3072), 8) == PartitionSpec(None, "fsdp")
    assert sharding.spec((3072, 768), 8) == PartitionSpec("fsdp")
    assert sharding.spec((512, 512), 8) == PartitionSpec(None, "fsdp")
    assert sharding.spec((3, 3, 512, 510), 4) == PartitionSpec(None, None, "fsdp")
    assert sharding.spec((768,), 8) == PartitionSpec()  # small
    assert sharding.spec((30_523, 1), 8) == PartitionSpec()  # nothing divides
    assert sharding.spec((768, 3072), 1) == PartitionSpec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.batch_size=30"], "train.batch_size=30 cannot be divided among 8 devices; .*: 24 and 32"),
        (["train.batch_size=4"], "nearest that can: 8"),
        (["train.eval_batch_size=20"], "train.eval_batch_size=20 .* 16 and 24"),
        (["train.batch_size=32", "train.accumulate_steps=8"], "8 devices in train.accumulate_steps=8 parts; .*64"),
        (["parallel.fsdp=3"], "parallel.fsdp=3 does not divide 8 devices; set it to one of 1, 2, 4, 8"),
    ],
)
def test_what_does_not_divide_is_told_with_the_nearest_that_does(changes, message):
    with pytest.raises(UserError, match=message):
        sharding.check(config.override(IMAGES, changes), 8)


def test_more_devices_than_there_are_are_an_error_before_anything_is_read(tmp_path):
    experiment = config.override(IMAGES, ["parallel.devices=64", "data.source=folder", "data.dir=nowhere"])
    with pytest.raises(UserError, match=rf"parallel.devices=64: there are {len(jax.devices())}"):
        loop.train(experiment, tmp_path / "run")
