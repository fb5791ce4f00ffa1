"""Image examples: listed, and decoded."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

# (iterable, total, description) -> the same items; draws a progress bar on the way.
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One split, decoded.

    Attributes:
        images: `[n, height, width, 3]` uint8, in memory or memory-mapped.
        labels: `[n]` int32, positions in `class_names`.
        class_names: names of the classes; the same for both splits.
        ids: a name for each example: the file's path relative to the folder, or `split:index`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Listing:
    """Examples not decoded yet: `read` fetches a run of `items` and returns a function for each, which opens it."""

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


def no_progress(iterable: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """The `Track` that shows nothing."""
    return iterable
