"""Batches of a few static shapes, in an order that is a function of the seed alone.

Row numbers are grouped into batches, images all in one group and texts by length; what the rows hold is gathered last,
for one batch at a time. grain reads ahead; the state of its iterator is the number of batches taken.
"""

import functools
from collections import abc

import grain
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
        `rows`: `[batch_size]` int32, the same for the rows of all shards.
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
    part = slice(index * batch_size // count, (index + 1) * batch_size // count)

    def gather(batch: tuple[np.ndarray, int, int]) -> dict[str, np.ndarray | Sequence]:
        examples, length, view = batch
        whole = np.concatenate([examples, np.full(batch_size - len(examples), -1, np.int32)])
        padded = whole[part]
        rows = np.where(padded >= 0, padded, examples[0])
        return {
            "input": _inputs(dataset, view * len(dataset.labels) + rows, length),
            "label": dataset.labels[rows],
            "weight": (padded >= 0).astype(np.float32),
            "index": padded,
            "rows": whole,
        }

    source = _Batches(dataset, batch_size, seed, epochs, lengths)
    return iter(grain.MapDataset.source(source).map(gather).to_iter_dataset(_READ))


def _inputs(dataset: Examples, rows: np.ndarray, length: int) -> np.ndarray | Sequence:
    if isinstance(dataset.inputs, Ragged):
        found = dataset.inputs.lengths[rows].astype(np.int32)
        return Sequence(dataset.inputs.padded(rows, length), found)
    return np.asarray(dataset.inputs[rows])


class _Batches:
    """(rows, length, view) of every batch of all epochs, by number."""

    def __init__(self, dataset: Examples, batch_size: int, seed: int | None, epochs: int, lengths: abc.Sequence[int]):
        count = len(dataset.labels)
        own, shapes = dataset.inputs.lengths if isinstance(dataset.inputs, Ragged) else dataset.token_counts, lengths
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
