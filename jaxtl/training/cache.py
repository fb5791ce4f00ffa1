"""Activations at the freeze boundary, computed once."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from jaxtl.data import loader
from jaxtl.data.listing import ImageSet
from jaxtl.progress import track


def fill(
    prefix: Callable[[jax.Array], jax.Array],
    dataset: ImageSet,
    batch_size: int,
    activations: jax.ShapeDtypeStruct,
    split: str,
) -> ImageSet:
    """Returns the data set with each image replaced by its activations.

    Args:
        prefix: compiled, raw images [batch_size, height, width, 3] -> activations [batch_size, ..].
        dataset: the images.
        batch_size: of `prefix`.
        activations: shape and dtype of one example's.
        split: for the progress bar.
    """
    count = len(dataset.labels)
    kept = np.empty((count, *activations.shape), activations.dtype)
    batches = loader.batches(dataset, batch_size, seed=None, epochs=1)
    for batch in track(batches, loader.steps_per_epoch(count, batch_size), f"frozen stages, {split} images"):
        rows = batch["index"] >= 0
        kept[batch["index"][rows]] = np.asarray(prefix(jax.device_put(batch["image"])))[rows]
    return dataclasses.replace(dataset, images=kept)
