"""Which examples share a batch, and texts filled up to the length of their batch. numpy only: all peers share it."""

import numpy as np

from benchmarks.prepare import Split


def training_rows(split: Split, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Returns one epoch's batches of row numbers, every row once.

    Images in random order. Texts as transformers' `LengthGroupedSampler` has them: the random order is cut into runs of
    50 batches (a quarter of the epoch where that is less), and each run is sorted by length, the longest first. The
    longest text of all comes first, so that memory runs out at once if it does.
    """
    order = random.permutation(len(split.labels))
    if split.offsets is not None:
        run = max(min(len(order) // (batch_size * 4), 50), 1) * batch_size
        lengths = split.lengths
        parts = [
            part[np.argsort(-lengths[part], kind="stable")] for part in np.split(order, range(run, len(order), run))
        ]
        longest = int(np.argmax([lengths[part[0]] for part in parts]))
        parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
        order = np.concatenate(parts)
    return _cut(order, batch_size)


def evaluation_rows(split: Split, batch_size: int) -> list[np.ndarray]:
    """Returns batches of row numbers, every row once: images in their order, texts by length."""
    if split.offsets is None:
        return _cut(np.arange(len(split.labels)), batch_size)
    return _cut(np.argsort(split.lengths, kind="stable"), batch_size)


def padded(split: Split, rows: np.ndarray, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids `[rows, length]` int32, filled up with 0, and the lengths of the texts `[rows]` int64.

    Without `length`, that of the longest text.
    """
    lengths = split.lengths[rows]
    ids = np.zeros((len(rows), length or lengths.max()), np.int32)
    for target, row, count in zip(ids, rows, lengths, strict=True):
        target[:count] = split.inputs[split.offsets[row] : split.offsets[row] + count]
    return ids, lengths


def _cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return np.split(order, range(batch_size, len(order), batch_size))
