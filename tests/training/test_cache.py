"""Activations computed once: by whom, from what, and that training on them is the same as training without."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl import config
from jaxtl.data import loader, sources
from jaxtl.data.listing import Examples, Ragged, no_progress
from jaxtl.errors import UserError
from jaxtl.training import cache, freeze, loop
from jaxtl.training.evaluate import preparation
from jaxtl.training.network import initial_params, load_run, locate
from jaxtl.training.setup import describe, look
from jaxtl.training.store import ARRAY, DESCRIPTION

BASE = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=32, dropout=0.5)),
    data=config.Images(source="digits", train_size=100, eval_size=50),
    freeze=freeze.train_from("block_3"),
    optim=config.Optim("adamw", learning_rate=1e-3, weight_decay=0.1),
    train=config.Train(epochs=2, batch_size=32, eval_batch_size=32, log_every=2),
)
VIEWS = ("data.augment=crop_flip", "plan.cached_views=2")
MAPPED = "plan.cache_budget_gb=0"


def change(experiment, *assignments):
    return config.override(experiment, assignments)


@pytest.fixture
def here(tmp_path):
    """The experiment, with a folder of its own for what is kept."""
    return change(BASE, f"plan.cache_dir={tmp_path / 'kept'}")


def entries(experiment):
    folder = experiment.plan.cache_dir
    return sorted(set(os.listdir(folder)) - {".lock", ".keys"}) if os.path.isdir(folder) else []


def run_prefix(experiment):
    """Does what a run does, up to its first step."""
    this, drawn = look(experiment, locate)
    assert this.plan.cached, this.plan.reason
    params = initial_params(this.net, experiment.model, this.weights, experiment.train.seed)
    params, frozen = freeze.partition(params, this.labels)
    if isinstance(experiment.data, config.Images):
        drawn = sources.read(drawn, experiment.data.resize, experiment.model.image_size, no_progress)
    found = cache.run_prefix(this, preparation(this), params, frozen, drawn)
    if found:
        assert found.bytes == this.plan.cache_bytes
    return found


def arrays(found):
    inputs = [split.inputs for split in found.splits]
    return [each.values if isinstance(each, Ragged) else each for each in inputs]


def same(one, other):
    return all(a.tobytes() == b.tobytes() for a, b in zip(arrays(one), arrays(other), strict=True))


@pytest.fixture
def no_computing(monkeypatch):
    """Returns what forbids the prefix to be run from then on."""

    def forbid():
        monkeypatch.setattr(cache, "compile_step", lambda *_: pytest.fail("the prefix was run again"))

    return forbid


# --- one run for another ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [(), (MAPPED,)], ids=["memory", "mapped"])
def test_another_run_loads_what_the_first_computed(here, no_computing, capsys, where):
    first = run_prefix(change(here, *where))
    assert first.origin == "computed"
    assert len(entries(here)) == 2
    no_computing()
    capsys.readouterr()
    for other in (("optim.learning_rate=1e-4",), ("train.epochs=3", "train.batch_size=50")):
        second = run_prefix(change(here, *other, *where))
        assert second.origin == "loaded"
        assert same(first, second)
        (line,) = capsys.readouterr().err.splitlines()
        assert "ran before for the training, held-out examples" in line
        assert here.plan.cache_dir in line
    kinds = {isinstance(array, np.memmap) for found in (first, second) for array in arrays(found)}
    assert kinds == {bool(where)}


def test_split_that_is_the_same_is_loaded_and_the_other_computed(here):
    first = run_prefix(here)
    second = run_prefix(change(here, "data.train_size=60"))
    assert second.origin == "computed"
    assert len(entries(here)) == 3
    assert arrays(first)[1].tobytes() == arrays(second)[1].tobytes()


def test_text_is_loaded_as_it_was_computed(bert_folder, text_folder, tmp_path, no_computing):
    experiment = config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=config.Head("bigru", "sequence", hidden=8)),
        data=config.Text(dir=str(text_folder), train=("train.csv",), validation="val.csv", max_length=40, buckets=1),
        freeze=freeze.train_head_only(),
        train=config.Train(epochs=2, batch_size=16, eval_batch_size=64),
        plan=config.Plan(cache_dir=str(tmp_path)),
    )
    first = run_prefix(experiment)
    no_computing()
    second = run_prefix(change(experiment, "train.seed=5"))  # the weights are in a file
    assert (first.origin, second.origin) == ("computed", "loaded")
    assert same(first, second)
    for one, other in zip(first.splits, second.splits, strict=True):
        assert one.inputs.values.shape == (one.inputs.lengths.sum(), 32)  # no padding
        np.testing.assert_array_equal(one.inputs.offsets, other.inputs.offsets)


# --- what the activations depend on ----------------------------------------------------------------------

PIXELS = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)


def origins(*assignments, views=0, weights="digest", inputs=PIXELS, dtype="float32"):
    experiment = change(BASE, *assignments)
    return cache.origins(
        describe(experiment, None, 10, 4, 4), weights, Examples(inputs, *[()] * 3), views, np.dtype(dtype)
    )


def test_origins_are_json():
    assert json.loads(json.dumps(origins())) == origins()


@pytest.mark.parametrize(
    "changed",
    [
        dict(weights="other"),
        dict(inputs=PIXELS + 1),
        dict(inputs=PIXELS.astype(np.int32)),
        dict(inputs=PIXELS.reshape(4, 8, 3, 8)),
        dict(dtype=jnp.bfloat16),
        dict(views=1),
        'freeze=train_from("block_4")',
        "model.image_size=16",
        "data.scale=half",
        "train.precision=bfloat16",
        "train.eval_batch_size=16",
    ],
    ids=str,
)
def test_origins_tell_what_is_computed_otherwise(changed):
    other = origins(changed) if isinstance(changed, str) else origins(**changed)
    assert other != origins()


@pytest.mark.parametrize(
    "changed",
    [
        "optim.learning_rate=1e-4",
        "train.seed=5",
        "train.epochs=7",
        "train.batch_size=4",
        "model.head.hidden=16",
        "model.head.reads=cls_patches",  # the last block is not in the prefix
        "plan.prune=False",  # the same
        "data.augment=flip",
        "plan.cache_budget_gb=0",
    ],
)
def test_origins_do_not_tell_what_makes_no_difference(changed):
    assert origins(changed) == origins()


def test_origins_of_a_frozen_backbone_tell_what_the_head_reads():
    """With the head alone learning, what it reads is kept; where the last norm learns too, the tokens it reads."""
    alone = "freeze=train_head_only()"
    assert origins(alone)["reads"] == ["cls", 1]
    assert origins(alone, "plan.prune=False")["reads"] == ["cls", None]  # the same, but for rounding
    assert origins(alone, "model.head.reads=cls_patches")["reads"] == ["cls_patches", None]
    norm = 'freeze=train_from("norm")'
    assert origins(norm)["reads"] == [None, 1]
    assert origins(norm, "plan.prune=False")["reads"] == [None, None]


def test_origins_of_views_tell_how_they_are_drawn():
    drawn = [
        origins("data.augment=flip", views=2),
        origins("data.augment=flip", views=3),
        origins("data.augment=crop_flip", views=2),
        origins("data.augment=flip", "train.seed=5", views=2),
    ]
    assert all(one != other for number, one in enumerate(drawn) for other in drawn[:number])


def test_origins_of_texts_tell_where_one_ends():
    values, lengths = np.arange(6, dtype=np.int32), ([0, 3, 6], [0, 2, 6])
    first, second = (origins(inputs=Ragged(values, np.array(offsets))) for offsets in lengths)
    assert first != second


def test_origins_tell_the_architecture_and_the_lengths_of_batches(monkeypatch):
    this = describe(BASE, None, 10, 4, 4)
    examples = Examples(PIXELS, *[()] * 3)
    other = [
        dataclasses.replace(this, lengths=(8,)),
        dataclasses.replace(
            this, net=dataclasses.replace(this.net, config=dataclasses.replace(this.net.config, norm_epsilon=1))
        ),
    ]
    for changed in other:
        assert cache.origins(changed, "digest", examples, 0, np.dtype("float32")) != origins()
    monkeypatch.setattr(cache.metadata, "version", lambda name: "0")
    assert origins()["versions"] == {"jax": "0", "jaxlib": "0", "flax": "0"}
    monkeypatch.undo()
    for name, value in (("_code", "other"), ("_processor", "another")):
        with monkeypatch.context() as patch:
            before = origins()
            patch.setattr(cache, name, lambda value=value: value)
            assert origins() != before
    before = origins()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert origins() != before
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    laid = dataclasses.replace(this, layout=dataclasses.replace(this.layout, mesh=mesh))
    assert cache.origins(laid, "digest", examples, 0, np.dtype("float32")) != before


# --- what can go wrong with the files --------------------------------------------------------------------


def test_damaged_file_is_said_and_computed_anew(here, capsys):
    first = run_prefix(here)
    damaged, headless = (os.path.join(here.plan.cache_dir, entry) for entry in entries(here))
    with open(os.path.join(damaged, ARRAY), "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    os.unlink(os.path.join(headless, DESCRIPTION))
    capsys.readouterr()
    second = run_prefix(here)
    said = capsys.readouterr().err
    assert said.count("damaged cache entry") == 2
    assert second.origin == "computed"
    assert same(first, second)
    assert run_prefix(here).origin == "loaded"


@pytest.mark.parametrize("where", [(), (MAPPED,)], ids=["memory", "mapped"])
def test_run_ended_while_filling_leaves_nothing(here, monkeypatch, where):
    batches = loader.batches

    def interrupted(*arguments, **settings):
        yield next(batches(*arguments, **settings))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.loader, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_prefix(change(here, *where))
    assert entries(here) == []
    assert run_prefix(change(here, *where)).origin == "computed"


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room(monkeypatch, experiment, kind):
    """Makes it impossible to write to the folder, in one of several ways; returns (experiment, what is said)."""
    if kind == "full disk":
        monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
        return experiment, "No space left on device"
    if kind == "read-only":
        os.makedirs(experiment.plan.cache_dir)

        def refuse(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(cache.storage.os, "mkdir", refuse)
        return experiment, "Read-only file system"
    if kind == "no folder":
        with open(experiment.plan.cache_dir, "w") as file:
            file.write("x")
        return experiment, "File exists"
    return change(experiment, "plan.cache_disk_gb=0.0001"), "the limit of 0.0001 GB leaves no room"


KINDS = ("full disk", "read-only", "no folder", "limit")


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_in_memory_needs_no_disk(here, monkeypatch, capsys, kind):
    kept = run_prefix(change(here, f"plan.cache_dir={here.plan.cache_dir}.elsewhere"))
    experiment, reason = no_room(monkeypatch, here, kind)
    capsys.readouterr()
    found = run_prefix(change(experiment, "plan.cache=on"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not kept for other runs" in line]
    assert reason in line
    assert here.plan.cache_dir in line
    assert found.origin == "computed"
    assert same(kept, found)
    assert entries(here) == []


@pytest.mark.parametrize("kind", KINDS[:-1])  # of the limit, the plan knows
def test_what_fits_nowhere_is_not_kept(here, monkeypatch, capsys, kind):
    experiment, reason = no_room(monkeypatch, change(here, MAPPED), kind)
    capsys.readouterr()
    assert run_prefix(experiment) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert "the frozen stages run in every step" in line
    with pytest.raises(UserError, match=f"plan.cache=on is not possible.*{reason}"):
        run_prefix(change(experiment, "plan.cache=on"))
    assert entries(here) == []


def test_disk_that_has_room_for_one_split_alone_keeps_none(here, monkeypatch):
    calls = []
    reserve = cache.storage.reserve

    def once(*arguments):
        calls.append(arguments)
        return reserve(*arguments) if len(calls) == 1 else full_disk()

    monkeypatch.setattr(cache.storage, "reserve", once)
    assert run_prefix(change(here, MAPPED)) is None
    assert len(calls) == 2
    assert entries(here) == []


def test_files_in_a_folder_for_reading_alone_are_used(here, monkeypatch):
    first = run_prefix(here)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "utime", "rename"):
        monkeypatch.setattr(os, name, refuse)
    second = run_prefix(here)
    assert second.origin == "loaded"
    assert same(first, second)


# --- dtype, views ----------------------------------------------------------------------------------------


def test_bfloat16_takes_half_the_space_and_comes_as_the_model_computes(here):
    exact, short = run_prefix(here), run_prefix(change(here, "plan.cache_dtype=bfloat16"))
    assert short.bytes * 2 == exact.bytes
    for long, rounded in zip(arrays(exact), arrays(short), strict=True):
        np.testing.assert_array_equal(rounded, long.astype(jnp.bfloat16))
    again = run_prefix(change(here, "plan.cache_dtype=bfloat16"))
    assert again.origin == "loaded"
    assert same(short, again)
    batch = next(loader.batches(again.splits[0], 8, seed=0))
    prepared = again.prepare(batch, None)["input"]
    assert prepared.dtype == jnp.float32
    np.testing.assert_array_equal(prepared, batch["input"].astype(np.float32))


def test_views_differ_and_are_drawn_again_from_the_same_seed_alone(here):
    plain = run_prefix(here)
    found = run_prefix(change(here, *VIEWS))
    train, held_out = found.splits
    assert (train.views, held_out.views) == (2, 1)
    first, second = np.split(train.inputs, 2)
    changes = [
        np.abs(one - other).reshape(100, -1).max(axis=1)
        for one, other in ((first, second), (first, plain.splits[0].inputs), (second, plain.splits[0].inputs))
    ]
    # A crop keeps at most the whole image, and is never drawn so exactly.
    assert all((change > 0).all() for change in changes)
    np.testing.assert_array_equal(held_out.inputs, plain.splits[1].inputs)  # not augmented
    elsewhere = run_prefix(change(here, *VIEWS, f"plan.cache_dir={here.plan.cache_dir}.elsewhere"))
    assert elsewhere.origin == "computed"
    assert same(found, elsewhere)
    more = run_prefix(change(here, *VIEWS, "plan.cached_views=5", "train.epochs=3"))
    assert more.splits[0].views == 3  # a fourth would never be seen
    np.testing.assert_array_equal(more.splits[0].inputs[:200], train.inputs)


def test_every_batch_of_views_is_drawn_apart(here, monkeypatch):
    """Of 100 times the same image, all activations differ: within a batch, and between the batches."""
    read = sources.read

    def alike(*arguments):
        splits = read(*arguments)
        return [dataclasses.replace(split, inputs=split.inputs[[0] * len(split.labels)]) for split in splits]

    monkeypatch.setattr(sources, "read", alike)
    train, held_out = arrays(run_prefix(change(here, *VIEWS)))
    assert len({row.tobytes() for row in train}) == 200
    assert len({row.tobytes() for row in held_out}) == 1


# --- whole runs ------------------------------------------------------------------------------------------


def train(experiment, folder):
    result = loop.train(experiment, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, [(line["split"], line["step"], line["loss"]) for line in lines], load_run(folder).trained


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(value, other[path]) for path, value in one.items())


@pytest.mark.slow
def test_training_is_the_same_wherever_the_activations_are(here, tmp_path, monkeypatch):
    """In memory, mapped, loaded: bit for bit. Without a cache, or with all of the last block, but for rounding, in
    float32.

    The program of the whole step fuses otherwise than those of its two parts, so that activations differ in their last
    bits. Eight steps of Adam, each normalising its gradient, carry that on: 1e-4 of the largest parameter is a tenth of
    one step's length (1e-3).
    """
    computed = train(here, tmp_path / "computed")
    loaded = train(here, tmp_path / "loaded")
    elsewhere = change(here, MAPPED, f"plan.cache_dir={tmp_path / 'mapped'}")
    mapped = train(elsewhere, tmp_path / "run mapped")
    off = train(change(here, "plan.cache=off"), tmp_path / "off")
    unpruned = train(change(here, "plan.prune=false"), tmp_path / "unpruned")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk, raising=False)
        nowhere = train(change(elsewhere, f"plan.cache_dir={tmp_path / 'full'}"), tmp_path / "nowhere")
    runs = {"computed": computed, "loaded": loaded, "mapped": mapped, "off": off, "nowhere": nowhere}
    assert {name: result["cache"] for name, (result, _, _) in runs.items()} == {
        "computed": "computed",
        "loaded": "loaded",
        "mapped": "computed",
        "off": "off",
        "nowhere": "off",
    }
    size = computed[0]["cache_bytes"]
    assert size > 0
    assert [result["cache_bytes"] for result, _, _ in runs.values()] == [size, size, size, 0, 0]
    for same_run in (loaded, mapped):
        assert same_run[1] == computed[1]
        assert equal(same_run[2], computed[2])
    assert nowhere[1] == off[1]
    assert equal(nowhere[2], off[2])
    for other in (off, unpruned):
        for (*place, loss), (*other_place, other_loss) in zip(computed[1], other[1], strict=True):
            assert place == other_place
            assert loss == pytest.approx(other_loss, rel=1e-4)
        for path, value in computed[2].items():
            if not path.endswith("attention/key/bias"):  # its gradient is zero: Adam makes steps out of rounding alone
                np.testing.assert_allclose(value, other[2][path], atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_run_on_cached_views_repeats_bit_for_bit_and_tells_what_it_kept(here, tmp_path):
    first = train(change(here, *VIEWS), tmp_path / "first")
    second = train(change(here, *VIEWS), tmp_path / "second")
    assert (first[0]["cache"], second[0]["cache"]) == ("computed", "loaded")
    assert first[1] == second[1]
    assert equal(first[2], second[2])
    plain = run_prefix(here)
    row = plain.splits[0].inputs[0].nbytes
    assert first[0]["cache_bytes"] == (2 * 100 + 50) * row
