"""Batches of a few static shapes, in an order that is a function of the seed alone.

Row numbers are grouped into batches, images all in one group and texts by length; what the rows hold is gathered last,
for one batch at a time. grain reads ahead; the state of its iterator is the number of batches taken.
"""

import functools
from collections import abc

import grain
import jax
import numpy as np

from jaxtl.data import buckets
from jaxtl.data.listing import Examples, Ragged
from jaxtl.errors import UserError
from jaxtl.models.stages import Sequence

# The gather is a copy out of memory or a memory-mapped file: one thread and two batches in advance hide it.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch of `n` examples, the padded one among them."""
    return -(-n // batch_size)


def owners(lengths: np.ndarray | None, count: int, batch_size: int, shards: int) -> np.ndarray:
    """Returns which of several shards holds each example: the one that has it when all are gone through in order.

    Args:
        lengths: of texts; None of images.
        count: number of examples.
        batch_size: rows of a batch over all shards, by which all are gone through.
        shards: their number.

    Returns:
        `[count]` int32.
    """
    order = np.arange(count) if lengths is None else np.argsort(lengths, kind="stable")  # as `buckets.group`
    found = np.empty(count, np.int32)
    found[order] = np.arange(count) % batch_size // (batch_size // shards)
    return found


def places(owners: np.ndarray) -> np.ndarray:
    """Returns `[n]` int64: the place of each example among those of its shard, which are in order."""
    found = np.empty(len(owners), np.int64)
    order = np.argsort(owners, kind="stable")
    sizes = np.bincount(owners)
    found[order] = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return found


def batches(
    dataset: Examples,
    batch_size: int,
    *,
    seed: int | None,
    epochs: int = 1,
    lengths: abc.Sequence[int] = (),
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Returns an iterator over batches: every example exactly once an epoch, whatever the batch size.

    Where the data set has several views of each example, the first epoch goes over the first of them, and so on, and
    after the last begins again.

    Each batch is a dict of
        `input`: images `[rows, height, width, 3]` uint8, other arrays `[rows, ..]`, or a `Sequence` filled up to one of
            `lengths`,
        `label`: `[rows]` int32,
        `weight`: `[rows]` float32, 1, and 0 for the rows that fill up the one batch of an epoch that is short,
        `index`: `[rows]` int32, the row of `dataset`, and -1 where the weight is 0,
        `rows`: `[batch_size]` int32, the same for the rows of all shards,
        `source`: only where the data set has `owners`, and not every row of the batch is held by its own shard. `input`
            then has those examples of the whole batch that this shard holds, filled up to as many rows as every other
            shard's; `[rows]` int32 says where the shard's rows are when the inputs of all are put one after the other.
    A row of weight 0 repeats the first one of its batch, so that nothing computed from it is out of range.

    The rows of a batch are drawn before they are divided among the shards: shard `i` of `count` gets the i-th of
    `count` equal runs of rows. So every shard takes the same number of steps, and the examples of a step do not
    depend on the number of shards; put side by side in the order of the shards they are the unsharded batch.

    Args:
        dataset: what to read. Its arrays may be memory-mapped.
        batch_size: rows of a batch over all shards.
        seed: fixes the order, another one each epoch. None: the order of the data set, texts by length.
        epochs: passes over the data set.
        lengths: of the batches, where the inputs are sequences; ascending.
        shard: (index, count) of this process.

    Returns:
        A grain iterator. `get_state()` is a JSON-like dict; `set_state` of it on an iterator made from the same
        arguments continues with the next batch, in the middle of an epoch too.

    Raises:
        UserError: `batch_size` is no multiple of the shard count.
    """
    index, count = shard
    if batch_size % count:
        raise UserError(
            f"a batch of {batch_size} cannot be divided among {count} processes; set train.batch_size and "
            f"train.eval_batch_size to multiples of {count}"
        )
    share = batch_size // count
    part = slice(index * share, (index + 1) * share)
    held = None if dataset.owners is None else _Held(dataset, index, count)

    def gather(batch: tuple[np.ndarray, int, int]) -> dict[str, np.ndarray | Sequence]:
        examples, length, view = batch
        whole = np.concatenate([examples, np.full(batch_size - len(examples), -1, np.int32)])
        padded = whole[part]
        rows = np.where(padded >= 0, padded, examples[0])
        if held is None:
            found = {"input": _inputs(dataset.inputs, view * len(dataset.labels) + rows, length)}
        else:
            inputs, source = held.gather(examples, length, view, share)
            found = {"input": inputs}
            if source is not None:
                found["source"] = np.resize(source, batch_size)[part]
                found["source"][padded < 0] = source[0]
        return {
            **found,
            "label": dataset.labels[rows],
            "weight": (padded >= 0).astype(np.float32),
            "index": padded,
            "rows": whole,
        }

    source = _Batches(dataset, batch_size, seed, epochs, lengths)
    return iter(grain.MapDataset.source(source).map(gather).to_iter_dataset(_READ))


def _inputs(inputs: np.ndarray | Ragged, rows: np.ndarray, length: int) -> np.ndarray | Sequence:
    if isinstance(inputs, Ragged):
        return Sequence(inputs.padded(rows, length), inputs.lengths[rows].astype(np.int32))
    return np.asarray(inputs[rows])


class _Held:
    """The examples that one of several shards holds."""

    def __init__(self, dataset: Examples, index: int, count: int):
        self._inputs, self._owners = dataset.inputs, dataset.owners
        self._index, self._count = index, count
        self._size = np.count_nonzero(dataset.owners == index)  # of a view
        self._places = places(dataset.owners)

    def gather(
        self, rows: np.ndarray, length: int, view: int, share: int
    ) -> tuple[np.ndarray | Sequence, np.ndarray | None]:
        """Returns this shard's inputs for a batch, filled up, and where each of `rows` is among all shards'.

        Filled up to a multiple of `share`, so that there are few shapes of them. None: every shard holds its own rows.
        """
        holders = self._owners[rows]
        counts = np.bincount(holders, minlength=self._count)
        room = -(-counts.max() // share) * share
        found = _inputs(self._inputs, view * self._size + self._places[rows[holders == self._index]], length)

        def fill_up(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.zeros((room - len(x), *x.shape[1:]), x.dtype)])

        if np.array_equal(holders, np.arange(share * self._count) // share):
            return found, None
        return jax.tree.map(fill_up, found), (holders * room + places(holders)).astype(np.int32)


class _Batches:
    """(rows, length, view) of every batch of all epochs, by number."""

    def __init__(self, dataset: Examples, batch_size: int, seed: int | None, epochs: int, lengths: abc.Sequence[int]):
        count = len(dataset.labels)
        own, shapes = dataset.token_counts, lengths
        if own is None and isinstance(dataset.inputs, Ragged):
            own = dataset.inputs.lengths
        if own is None:
            own, shapes = np.zeros(count, np.int64), (0,)
        self._steps = steps_per_epoch(count, batch_size)
        self._epochs = epochs
        self._views = dataset.views

        @functools.lru_cache(1)  # batches are asked for in order
        def epoch(number: int) -> list[tuple[np.ndarray, int]]:
            random = None if seed is None else np.random.default_rng([seed, number])
            return buckets.group(own, shapes, batch_size, random)

        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps * self._epochs

    def __getitem__(self, number: int) -> tuple[np.ndarray, int, int]:
        epoch, step = divmod(int(number), self._steps)
        return *self._epoch(epoch)[step], epoch % self._views
