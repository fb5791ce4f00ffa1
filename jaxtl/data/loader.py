"""Batches of one static shape from an image set, in an order that is a function of the seed alone.

grain shuffles, batches and repeats row numbers; pixels are gathered last, for one batch at a time. The state of the
iterator is the number of batches taken.
"""

import grain
import numpy as np

from jaxtl.data.sources import ImageSet
from jaxtl.errors import UserError

# The gather is a copy out of memory or a memory-mapped file. One thread keeps the order of reads in a mapped file
# sequential, and two batches in advance hide it.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch of `n` examples, the padded last one among them."""
    return -(-n // batch_size)


def batches(
    dataset: ImageSet,
    batch_size: int,
    *,
    seed: int | None,
    epochs: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Returns an iterator over batches: every example exactly once an epoch, whatever the batch size.

    Each batch is a dict of
        `image`: `[rows, height, width, 3]` uint8,
        `label`: `[rows]` int32,
        `weight`: `[rows]` float32, 1, and 0 for the rows that fill up the last batch of an epoch,
        `index`: `[rows]` int32, the row of `dataset`, and -1 where the weight is 0.
    A row of weight 0 holds the image and the label of example 0, so that nothing computed from it is out of range.

    The rows of a batch are drawn before they are divided among the shards: shard `i` of `count` gets the i-th of
    `count` equal runs of rows. So every shard takes the same number of steps, and the examples of a step do not
    depend on the number of shards; put side by side in the order of the shards they are the unsharded batch.

    Args:
        dataset: what to read. Its arrays may be memory-mapped.
        batch_size: rows of a batch over all shards.
        seed: fixes the order, another one each epoch. None: the order of the data set.
        epochs: passes over the data set.
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
    rows = batch_size // count

    def pad(examples: list[int]) -> np.ndarray:
        return np.array(examples + [-1] * (batch_size - len(examples)), np.int32)

    def gather(examples: np.ndarray) -> dict[str, np.ndarray]:
        mine = examples[index * rows : (index + 1) * rows]
        readable = np.maximum(mine, 0)
        return {
            "image": np.asarray(dataset.images[readable]),
            "label": dataset.labels[readable],
            "weight": (mine >= 0).astype(np.float32),
            "index": mine,
        }

    examples = grain.MapDataset.range(len(dataset.labels))
    if seed is not None:
        # Not `shuffle(seed)`: grain adds the epoch to the seed it is given, so that epoch 2 of seed 0 would be epoch 1
        # of seed 1. Seeding the data set hashes the seed first.
        examples = examples.seed(seed).shuffle()
    # Before `repeat`: a batch ends where its epoch ends.
    examples = examples.batch(batch_size, batch_fn=pad).repeat(epochs)
    return iter(examples.map(gather).to_iter_dataset(_READ))
