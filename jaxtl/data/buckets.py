"""Lengths that batches of texts are filled up to, and which texts share a batch.

A compiled step has static shapes. A few lengths, chosen to fit the texts, cost a compilation each and save most of the
arithmetic on padding.
"""

from collections.abc import Sequence

import numpy as np

# Where the number of lengths is not given: what another has to save in each epoch, in texts of mean length. They are a
# few steps; compiling takes the time of some on a CPU and of hundreds on an accelerator, and there are several epochs.
_WORTH = 128
# And the most: tweets fill 88 % of batches of eight lengths, and 92 % of sixteen.
_MOST = 8


def bucket_lengths(lengths: np.ndarray, count: int | None, limit: int, multiple: int = 8) -> tuple[int, ...]:
    """Returns the lengths that fill up the texts least, if each takes the smallest that holds it.

    Dynamic programming over the number of buckets and the longest one so far: exact, and quick, because only the
    histogram of the lengths counts.

    Args:
        lengths: `[n]` integers, at least one, none above `limit`.
        count: the most buckets. None: as many as pay for their compilation, few for few texts, and at most 8.
        limit: the longest bucket.
        multiple: buckets are multiples of this, or `limit`.

    Returns:
        Lengths, ascending; the last one holds every text.
    """
    if not len(lengths) or lengths.max() > limit:
        raise ValueError(f"{len(lengths)} lengths up to {max(lengths, default=0)}, limit {limit}")
    histogram = np.bincount(-(-np.maximum(lengths, 1) // multiple))
    (occupied,) = np.nonzero(histogram)  # a bucket that is no text's smallest one saves nothing
    sizes = np.minimum(occupied * multiple, limit)
    below = np.concatenate([[0], np.cumsum(histogram[occupied])])  # texts that fit into the first i sizes

    last = len(sizes)
    cost = np.concatenate([[0.0], np.full(last, np.inf)])  # of the first i sizes' texts, in the buckets so far
    chosen, totals = [], []
    for _ in range(min(_MOST if count is None else count, last)):
        # sums[i - 1, j]: texts of sizes j .. i - 1 in one bucket, the first j sizes in the buckets before.
        choice, best = np.zeros(last + 1, np.int64), np.full(last + 1, np.inf)
        for i in range(1, last + 1):
            sums = cost[:i] + sizes[i - 1] * (below[i] - below[:i])
            choice[i] = np.argmin(sums)
            best[i] = sums[choice[i]]
        cost = best
        chosen.append(choice)
        totals.append(cost[last])
    if count is None:
        chosen = chosen[: 1 + np.argmin(totals + _WORTH * np.mean(lengths) * np.arange(len(totals)))]
    buckets = []
    for choice in reversed(chosen):
        buckets.append(int(sizes[last - 1]))
        last = choice[last]
    return tuple(reversed(buckets))


def group(
    lengths: np.ndarray, buckets: Sequence[int], batch_size: int, random: np.random.Generator | None
) -> list[tuple[np.ndarray, int]]:
    """Returns one epoch's batches: every row once, in `ceil(n / batch_size)` batches, of which the last may be short.

    With `random`, rows of one bucket are drawn in random order. What is left over in the buckets is put together by
    length, so that one batch at most is short. The batches are then shuffled, but the short one. Without `random` the
    rows are in order of length, and those of one length in that of the data set.

    Args:
        lengths: `[n]` integers, none above the last bucket.
        buckets: ascending.
        batch_size: rows of a batch.
        random: draws the order.

    Returns:
        Pairs of row numbers `[rows]` int32 and a length, the smallest bucket that holds the longest of them.
    """
    if len(lengths) and lengths.max() > buckets[-1]:
        raise ValueError(f"a text of {lengths.max()} tokens is longer than the buckets {tuple(buckets)}")
    bucket = np.searchsorted(buckets, lengths)
    if random is None:
        rest = np.argsort(lengths, kind="stable").astype(np.int32)
        parts = np.split(rest, range(batch_size, len(rest), batch_size)) if len(rest) else []
        return [(part, _length(part, bucket, buckets)) for part in parts]

    order = random.permutation(len(lengths)).astype(np.int32)
    order = order[np.argsort(bucket[order], kind="stable")]
    batches, leftovers = [], [np.empty(0, np.int32)]
    for rows in np.split(order, np.cumsum(np.bincount(bucket, minlength=len(buckets)))[:-1]):
        full = len(rows) - len(rows) % batch_size
        batches += list(rows[:full].reshape(-1, batch_size))
        leftovers.append(rows[full:])
    rest = np.concatenate(leftovers)
    rest = rest[np.argsort(lengths[rest], kind="stable")]
    sizes = np.full(-(-len(rest) // batch_size), batch_size)
    if len(rest) % batch_size:
        # Any of them: the rows of a short batch weigh more in its mean, and that should not always be the longest.
        sizes[random.integers(len(sizes))] = len(rest) % batch_size
    batches += np.split(rest, np.cumsum(sizes)[:-1]) if len(rest) else []
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    shuffled.sort(key=lambda rows: len(rows) < batch_size)
    return [(rows, _length(rows, bucket, buckets)) for rows in shuffled]


def _length(rows: np.ndarray, bucket: np.ndarray, buckets: Sequence[int]) -> int:
    return int(buckets[bucket[rows].max()])
