"""The order of the examples: each once an epoch, fixed by the seed, resumable, the same for any number of shards."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtl.data import loader
from jaxtl.data.listing import Examples, Ragged
from jaxtl.errors import UserError


def examples(n: int) -> Examples:
    """Example i has the label i and pixels of value i."""
    labels = np.arange(n, dtype=np.int32)
    pixels = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (n, 2, 3, 3))
    return Examples(pixels, labels, tuple(map(str, labels)), tuple(map(str, labels)))


def epoch_orders(n: int, batch_size: int, seed: int | None, epochs: int, shard=(0, 1)) -> np.ndarray:
    """Returns the index column, `[epochs, steps, rows]`."""
    rows = [batch["index"] for batch in loader.batches(examples(n), batch_size, seed=seed, epochs=epochs, shard=shard)]
    return np.array(rows).reshape(epochs, loader.steps_per_epoch(n, batch_size), -1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    rows=st.integers(1, 12),
    shards=st.integers(1, 4),
    seed=st.none() | st.integers(0, 2**40),
    epochs=st.integers(1, 3),
)
def test_every_example_comes_exactly_once_an_epoch(n, rows, shards, seed, epochs):
    batch_size = rows * shards
    parts = [epoch_orders(n, batch_size, seed, epochs, (i, shards)) for i in range(shards)]
    together = np.concatenate(parts, axis=-1)
    assert together.shape == (epochs, -(-n // batch_size), batch_size)
    # Side by side, the shards are the unsharded batches.
    assert np.array_equal(together, epoch_orders(n, batch_size, seed, epochs))
    for epoch in together:
        assert sorted(epoch[epoch >= 0]) == list(range(n))
        short = [batch for batch in epoch if (batch < 0).any()]
        assert len(short) == (n % batch_size > 0)
        for batch in short:  # filled up at its end
            assert (batch[: n % batch_size] >= 0).all()
        if seed is None:
            assert epoch[epoch >= 0].tolist() == list(range(n))


def test_every_batch_has_one_shape_and_its_own_pixels():
    taken = list(loader.batches(examples(10), 4, seed=1, epochs=2))
    assert len(taken) == 6 == 2 * loader.steps_per_epoch(10, 4)
    for batch in taken:
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "input": ((4, 2, 3, 3), np.uint8),
            "label": ((4,), np.int32),
            "weight": ((4,), np.float32),
            "index": ((4,), np.int32),
            "rows": ((4,), np.int32),
        }
        real = batch["index"] >= 0
        assert np.array_equal(batch["weight"], real)
        assert np.array_equal(batch["label"], np.where(real, batch["index"], batch["index"][0]))
        assert np.array_equal(batch["input"][:, 1, 2, 0], batch["label"])
    for epoch in (taken[:3], taken[3:]):
        assert sorted(batch["weight"].sum() for batch in epoch) == [2, 4, 4]


def test_a_batch_larger_than_the_data_set_is_filled_up():
    (batch,) = loader.batches(examples(3), 8, seed=0)
    assert sorted(batch["index"][:3]) == [0, 1, 2]
    assert (batch["index"][3:] == -1).all()
    assert batch["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_the_order_is_fixed_by_the_seed_and_differs_between_epochs_and_seeds():
    orders = epoch_orders(50, 7, seed=3, epochs=3)
    assert np.array_equal(orders, epoch_orders(50, 7, seed=3, epochs=3))
    # Neighbouring seeds too: epoch 2 of one is no epoch of the other.
    seen = {epoch.tobytes() for seed in range(4) for epoch in epoch_orders(50, 7, seed, epochs=3)}
    assert len(seen) == 4 * 3


def test_more_epochs_continue_the_same_order():
    assert np.array_equal(epoch_orders(20, 6, 5, epochs=4)[:2], epoch_orders(20, 6, 5, epochs=2))


@pytest.mark.parametrize("taken", [0, 2, 5, 9])
def test_the_saved_state_continues_identically_in_the_middle_of_an_epoch(taken):
    def fresh():
        return loader.batches(examples(22), 5, seed=9, epochs=2)

    first = fresh()
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    resumed = fresh()
    next(resumed)  # a batch already taken does not matter, nor do the ones prefetched
    resumed.set_state(state)
    rest, again = list(first), list(resumed)
    assert len(rest) == len(again) == 10 - taken
    for one, other in zip(rest, again, strict=True):
        for name in one:
            assert np.array_equal(one[name], other[name])


def test_memory_mapped_images_come_as_plain_arrays(tmp_path):
    pixels = np.memmap(tmp_path / "pixels", np.uint8, "w+", shape=(6, 2, 2, 3))
    pixels[:] = np.arange(6, dtype=np.uint8)[:, None, None, None]
    dataset = Examples(pixels, np.arange(6, dtype=np.int32), ("a",) * 6, ("i",) * 6)
    batch = next(loader.batches(dataset, 4, seed=0))
    assert type(batch["input"]) is np.ndarray
    assert np.array_equal(batch["input"][:, 0, 0, 0], batch["index"])


def test_a_batch_that_the_processes_cannot_share_is_an_error():
    with pytest.raises(UserError, match="64 cannot be divided among 3"):
        loader.batches(examples(100), 64, seed=0, shard=(0, 3))


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(5000, 64, 79), (64, 64, 1), (65, 64, 2), (1, 64, 1)])
def test_steps_per_epoch_counts_the_padded_batch(n, batch_size, steps):
    assert loader.steps_per_epoch(n, batch_size) == steps


def texts(lengths: list[int]) -> Examples:
    """Example i is its number, as often as it is long."""
    values = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    labels = np.arange(len(lengths), dtype=np.int32)
    names = tuple(map(str, labels))
    return Examples(Ragged(values, np.concatenate([[0], np.cumsum(lengths)])), labels, names, names)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    seed=st.none() | st.integers(0, 2**32 - 1),
)
def test_every_text_comes_whole_exactly_once_in_one_of_the_shapes(lengths, batch_size, seed):
    seen = []
    for batch in loader.batches(texts(lengths), batch_size, seed=seed, lengths=(8, 16, 32)):
        values, found, positions = batch["input"]
        assert positions is None
        assert values.shape in {(batch_size, length) for length in (8, 16, 32)}
        for row, length, index in zip(values, found, batch["index"], strict=True):
            assert length >= 1  # attention needs a token, in rows that fill up too
            if index >= 0:
                assert length == lengths[index]
                assert (row[:length] == index).all()
                assert (row[length:] == 0).all()
                seen.append(int(index))
    assert sorted(seen) == list(range(len(lengths)))


def test_texts_in_the_middle_of_an_epoch_continue_identically():
    def fresh():
        return loader.batches(texts(list(range(1, 33))), 5, seed=9, epochs=2, lengths=(8, 32))

    first = fresh()
    for _ in range(9):
        next(first)
    resumed = fresh()
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    for one, other in zip(first, resumed, strict=True):
        assert np.array_equal(one["input"].values, other["input"].values)
        assert np.array_equal(one["index"], other["index"])


def test_shards_of_a_batch_of_texts_have_the_same_length():
    sets = [list(loader.batches(texts([3, 30, 4, 5]), 2, seed=1, lengths=(8, 32), shard=(i, 2))) for i in range(2)]
    for one, other in zip(*sets, strict=True):
        assert one["input"].values.shape == other["input"].values.shape


def views(n: int, count: int) -> Examples:
    """View v of example i has pixels of value 10 v + i."""
    values = (10 * np.arange(count)[:, None] + np.arange(n)).reshape(-1).astype(np.float32)
    labels = np.arange(n, dtype=np.int32)
    names = tuple(map(str, labels))
    return Examples(np.stack([values] * 2, axis=1), labels, names, names, views=count)


def test_each_epoch_goes_over_one_view_in_turn_and_in_the_same_order_as_without_views():
    taken = list(loader.batches(views(5, 3), 2, seed=7, epochs=7))
    plain = list(loader.batches(views(5, 1), 2, seed=7, epochs=7))
    assert len(taken) == 7 * 3
    for number, (batch, without) in enumerate(zip(taken, plain, strict=True)):
        view = number // 3 % 3
        np.testing.assert_array_equal(batch["index"], without["index"])
        np.testing.assert_array_equal(batch["label"], without["label"])
        np.testing.assert_array_equal(batch["input"], without["input"] + 10 * view)


@pytest.mark.parametrize("taken", [0, 4, 8, 13])
def test_saved_state_continues_with_the_right_view(taken):
    def fresh():
        return loader.batches(views(5, 2), 2, seed=7, epochs=5)

    first, resumed = fresh(), fresh()
    for _ in range(taken):
        next(first)
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    rest = list(resumed)
    assert len(rest) == 15 - taken
    for number, batch in enumerate(rest, taken):
        assert (batch["input"][:, 0] // 10 == number // 3 % 2).all()


def shared_out(dataset: Examples, batch_size: int, shards: int) -> list[Examples]:
    """Returns the data set as each of several shards holds it."""
    lengths = dataset.inputs.lengths if isinstance(dataset.inputs, Ragged) else None
    owners = loader.owners(lengths, len(dataset.labels), batch_size, shards)
    parts = []
    for shard in range(shards):
        own = np.flatnonzero(owners == shard)
        if lengths is None:
            rows = (np.arange(dataset.views)[:, None] * len(owners) + own).reshape(-1)
            parts.append(dataclasses.replace(dataset, inputs=dataset.inputs[rows], owners=owners))
            continue
        pieces = [dataset.inputs.values[slice(*dataset.inputs.offsets[row : row + 2])] for row in own]
        values = np.concatenate([dataset.inputs.values[:0], *pieces])
        inputs = Ragged(values, np.concatenate([[0], np.cumsum(lengths[own])]))
        parts.append(dataclasses.replace(dataset, inputs=inputs, token_counts=lengths, owners=owners))
    return parts


def put_together(batches: list[dict]) -> dict:
    """Returns the whole batch of those of all shards, as their devices make it of what the shards hold."""
    names = batches[0].keys() & {"label", "weight", "index", "source"}
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    held = jax.tree.map(lambda *parts: np.concatenate(parts), *(batch["input"] for batch in batches))
    return {**whole, "input": jax.tree.map(lambda x: x[whole["source"]], held) if "source" in whole else held}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["images", "views", "texts"]),
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=40),
    rows=st.integers(1, 6),
    eval_rows=st.integers(1, 6),
    shards=st.integers(2, 4),
    seed=st.none() | st.integers(0, 2**40),
)
def test_shards_that_hold_their_own_examples_make_the_same_batches(kind, lengths, rows, eval_rows, shards, seed):
    whole = {"images": lambda: examples(len(lengths)), "views": lambda: views(len(lengths), 3)}
    dataset = whole.get(kind, lambda: texts(lengths))()
    settings = {"seed": seed, "epochs": 2, "lengths": (8, 16) if kind == "texts" else ()}
    parts = shared_out(dataset, eval_rows * shards, shards)
    assert sum(len(part.inputs.offsets) - 1 if kind == "texts" else len(part.inputs) for part in parts) == (
        len(lengths) * dataset.views
    )
    streams = [
        loader.batches(part, rows * shards, shard=(index, shards), **settings) for index, part in enumerate(parts)
    ]
    for expected, *batches in zip(loader.batches(dataset, rows * shards, **settings), *streams, strict=True):
        assert {len(batch.get("source", batch["label"])) for batch in batches} == {rows}
        if seed is None and rows == eval_rows and (expected["weight"] > 0).all():
            assert not any("source" in batch for batch in batches)  # gone through as they were shared out
        assert len({jax.tree.leaves(batch["input"])[0].shape for batch in batches}) == 1
        found = put_together(batches)
        assert jax.tree.all(jax.tree.map(np.array_equal, found["input"], expected["input"]))
        for name in ("label", "weight", "index"):
            assert np.array_equal(found[name], expected[name])


@given(count=st.integers(1, 200), rows=st.integers(1, 8), shards=st.integers(1, 5))
def test_shards_hold_as_many_examples_as_each_other_up_to_a_batch(count, rows, shards):
    owners = loader.owners(None, count, rows * shards, shards)
    sizes = np.bincount(owners, minlength=shards)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= rows
