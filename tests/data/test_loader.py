"""The order of the examples: each once an epoch, fixed by the seed, resumable, the same for any number of shards."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtl.data import loader
from jaxtl.data.sources import ImageSet
from jaxtl.errors import UserError


def image_set(n: int) -> ImageSet:
    """Example i has the label i and pixels of value i."""
    labels = np.arange(n, dtype=np.int32)
    pixels = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (n, 2, 3, 3))
    return ImageSet(pixels, labels, tuple(map(str, labels)), tuple(map(str, labels)))


def epoch_orders(n: int, batch_size: int, seed: int | None, epochs: int, shard=(0, 1)) -> np.ndarray:
    """Returns the index column, `[epochs, steps, rows]`."""
    rows = [batch["index"] for batch in loader.batches(image_set(n), batch_size, seed=seed, epochs=epochs, shard=shard)]
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
        flat = epoch.ravel()
        assert sorted(flat[:n]) == list(range(n))
        assert (flat[n:] == -1).all()  # the padding is at the end of the epoch
        if seed is None:
            assert flat[:n].tolist() == list(range(n))


def test_every_batch_has_one_shape_and_its_own_pixels():
    taken = list(loader.batches(image_set(10), 4, seed=1, epochs=2))
    assert len(taken) == 6 == 2 * loader.steps_per_epoch(10, 4)
    for batch in taken:
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "image": ((4, 2, 3, 3), np.uint8),
            "label": ((4,), np.int32),
            "weight": ((4,), np.float32),
            "index": ((4,), np.int32),
        }
        real = batch["index"] >= 0
        assert np.array_equal(batch["weight"], real)
        assert np.array_equal(batch["label"], np.where(real, batch["index"], 0))
        assert np.array_equal(batch["image"][:, 1, 2, 0], batch["label"])
    assert [batch["weight"].sum() for batch in taken] == [4, 4, 2, 4, 4, 2]


def test_a_batch_larger_than_the_data_set_is_filled_up():
    (batch,) = loader.batches(image_set(3), 8, seed=0)
    assert sorted(batch["index"][:3]) == [0, 1, 2]
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
        return loader.batches(image_set(22), 5, seed=9, epochs=2)

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
    dataset = ImageSet(pixels, np.arange(6, dtype=np.int32), ("a",) * 6, ("i",) * 6)
    batch = next(loader.batches(dataset, 4, seed=0))
    assert type(batch["image"]) is np.ndarray
    assert np.array_equal(batch["image"][:, 0, 0, 0], batch["index"])


def test_a_batch_that_the_processes_cannot_share_is_an_error():
    with pytest.raises(UserError, match="64 cannot be divided among 3"):
        loader.batches(image_set(100), 64, seed=0, shard=(0, 3))


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(5000, 64, 79), (64, 64, 1), (65, 64, 2), (1, 64, 1)])
def test_steps_per_epoch_counts_the_padded_batch(n, batch_size, steps):
    assert loader.steps_per_epoch(n, batch_size) == steps
