"""Examples: listed or read, and made into arrays."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

# (iterable, total, description) -> the same items; draws a progress bar on the way.
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths, end to end, without padding.

    Attributes:
        values: `[sum of lengths, ..]`: token ids int32, or their activations; in memory or memory-mapped.
        offsets: `[n + 1]` int64; example i is `values[offsets[i] : offsets[i + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """`[n]` int64."""
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Returns `[len(rows), length, ..]`: these examples, each filled up with zeros. All must fit."""
        batch = np.zeros((len(rows), length, *self.values.shape[1:]), self.values.dtype)
        for target, row in zip(batch, rows, strict=True):
            start, stop = self.offsets[row], self.offsets[row + 1]
            target[: stop - start] = self.values[start:stop]
        return batch


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split, as arrays.

    Attributes:
        inputs: images `[n, height, width, 3]` uint8, tokens, or the activations of either; in memory or
            memory-mapped. With several `views`, arrays are `[views * n, ..]`, view by view.
        labels: `[n]` int32, positions in `class_names`; all 0 where there are no classes.
        class_names: names of the classes; the same for all splits.
        ids: a name for each example: the file's path relative to the folder, `split:index`, or `file:record`.
        texts: the texts themselves; empty for images.
        token_counts: `[n]`, of texts of which `inputs` holds activations: they are batched as they were before, so that
            the same examples come together.
        views: of each example, in `inputs`; an epoch goes over one of them.
        owners: `[n]` int32, the shard whose `inputs` hold each example, see `jaxtl.data.loader.owners`: those of the
            others are not among them, and `n` is the number of its own there. None: all hold all.
    """

    inputs: np.ndarray | Ragged
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    texts: tuple[str, ...] = ()
    token_counts: np.ndarray | None = None
    views: int = 1
    owners: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images not decoded yet: `read` fetches a run of `items` and returns a function for each, which opens it."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: Sequence[str]
    items: Sequence[Any]
    read: Callable[[Sequence[Any]], list[Callable[[], Image.Image]]]

    def take(self, rows: np.ndarray) -> "Listing":
        """Returns the examples of these rows."""
        return dataclasses.replace(
            self,
            labels=self.labels[rows],
            ids=tuple(self.ids[row] for row in rows),
            items=[self.items[row] for row in rows],
        )


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts not tokenised yet; labels, names and ids as in `Examples`."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: Sequence[str]
    texts: Sequence[str]

    def take(self, rows: np.ndarray) -> "Texts":
        """Returns the examples of these rows."""
        return dataclasses.replace(
            self,
            labels=self.labels[rows],
            ids=tuple(self.ids[row] for row in rows),
            texts=tuple(self.texts[row] for row in rows),
        )


def no_progress(iterable: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """The `Track` that shows nothing."""
    return iterable
