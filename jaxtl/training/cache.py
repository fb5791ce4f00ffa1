"""Activations at the freeze boundary, computed once."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtl.data import loader
from jaxtl.data.listing import Examples, Ragged
from jaxtl.models import stages
from jaxtl.progress import track


def fill(
    prefix: Callable[[dict[str, Any]], Any],
    dataset: Examples,
    batch_size: int,
    lengths: Sequence[int],
    activations: jax.ShapeDtypeStruct | stages.Sequence,
    split: str,
) -> Examples:
    """Returns the data set with each input replaced by its activations; those of sequences without padding.

    Args:
        prefix: compiled, a raw batch -> activations of all its rows.
        dataset: the examples.
        batch_size: of `prefix`.
        lengths: of the batches, where the inputs are sequences.
        activations: what `prefix` returns for one row, abstract.
        split: for the progress bar.
    """
    count = len(dataset.labels)
    whole = isinstance(activations, stages.Sequence)  # every token of a text, and not one vector for it
    shape = activations.values if whole else activations
    offsets = dataset.inputs.offsets if whole else np.arange(count + 1)
    kept = np.empty((offsets[-1], *shape.shape[2 if whole else 1 :]), shape.dtype)
    batches = loader.batches(dataset, batch_size, seed=None, lengths=lengths)
    for batch in track(batches, loader.steps_per_epoch(count, batch_size), f"frozen stages, {split} examples"):
        outputs = jax.device_get(prefix(jax.device_put(batch)))
        values = outputs.values if whole else outputs
        for row, index in enumerate(batch["index"]):
            if index >= 0:
                start, stop = offsets[index], offsets[index + 1]
                kept[start:stop] = values[row, : stop - start] if whole else values[row]
    if whole:
        return dataclasses.replace(dataset, inputs=Ragged(kept, offsets))
    counts = dataset.inputs.lengths if isinstance(dataset.inputs, Ragged) else None
    return dataclasses.replace(dataset, inputs=kept, token_counts=counts)


def size(activations: jax.ShapeDtypeStruct | stages.Sequence, examples: int, tokens: int) -> int:
    """Returns the bytes that `fill` keeps for so many examples, of so many tokens together."""
    whole = isinstance(activations, stages.Sequence)
    shape = activations.values if whole else activations
    one = int(np.prod(shape.shape[2 if whole else 1 :])) * shape.dtype.itemsize
    return one * (tokens if whole else examples)
