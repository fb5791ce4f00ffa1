"""The execution plan: what of a run needs to be computed only once.

The leading stages in which nothing learns, and nothing is random since frozen stages run without dropout, give the same
activations for an example in every epoch. Where the input is the same too, they are computed once and kept.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxtl.config import Experiment
from jaxtl.errors import UserError
from jaxtl.models import stages
from jaxtl.training import freeze

# Kept activations take space, and time to read, which some frozen stages (embeddings alone, a first convolution) are
# not worth: `auto` keeps none that save less than this part of a run's operations.
_WORTH = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done once.

    Attributes:
        boundary: the last stage of the frozen prefix; None where the first stage learns.
        cached: whether the activations after the boundary are computed once and kept.
        reason: why and where, or why not.
        cache_bytes: space that they take, or would take; of several processes, in each.
        mapped: whether they are read from memory-mapped files, being too large for memory.
        views: augmented views kept of each training image; 0: images as they are.
    """

    boundary: str | None
    cached: bool
    reason: str
    cache_bytes: int
    mapped: bool = False
    views: int = 0


def boundary(labels: Mapping[str, str], stages: Sequence[str]) -> str | None:
    """Returns the last of the leading stages in which nothing learns, None where the first one learns."""
    frozen = freeze.frozen_stages(labels, stages)
    last = None
    for stage in stages:
        if stage not in frozen:
            return last
        last = stage
    raise ValueError("nothing learns")  # label_params does not let this pass


def kept(activations: jax.ShapeDtypeStruct | stages.Sequence, dtype: str) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of what is kept for an example, or, of a `Sequence`, for each of its tokens.

    Args:
        activations: what the frozen prefix returns for one example, abstract.
        dtype: `plan.cache_dtype`.
    """
    values = stages.values(activations)
    leading = 2 if isinstance(activations, stages.Sequence) else 1
    return jax.ShapeDtypeStruct(values.shape[leading:], values.dtype if dtype == "auto" else jnp.dtype(dtype))


def cache_bytes(
    activations: jax.ShapeDtypeStruct | stages.Sequence, examples: int, tokens: int, dtype: str = "auto"
) -> int:
    """Returns the bytes that the activations of so many examples, of so many tokens together, take."""
    row = kept(activations, dtype)
    rows = tokens if isinstance(activations, stages.Sequence) else examples
    return rows * math.prod(row.shape) * row.dtype.itemsize


def views(experiment: Experiment, passes: float) -> int:
    """Returns how many views of each training image are kept, if any are; 0: the images as they are.

    Args:
        experiment: what is asked for.
        passes: over the training examples, in the whole run. More views than those would never be seen.

    Raises:
        UserError: `plan.cached_views` where nothing about the input is drawn.
    """
    wanted = experiment.plan.cached_views
    if wanted and _augment(experiment) == "none":
        what = "data.augment=none" if hasattr(experiment.data, "augment") else "texts are not augmented"
        raise UserError(f"plan.cached_views={wanted}: there is nothing random to keep views of, {what}; set it to 0")
    return min(wanted, math.ceil(passes))


def make(experiment: Experiment, boundary: str | None, cache_bytes: int, passes: float, prefix: float) -> Plan:
    """Returns the plan of an experiment. Pure.

    Args:
        experiment: what is asked for.
        boundary: the last stage of the frozen prefix.
        cache_bytes: space that the activations after the boundary take, of all examples of all splits, and all
            `views` of the training images; of several processes, a process's share.
        passes: over the training examples, in the whole run.
        prefix: the part of a training step's operations that the frozen stages take.

    Raises:
        UserError: `plan.cache=on` or `plan.cached_views` where that cannot be.
    """
    settings, drawn = experiment.plan, views(experiment, passes)
    size = f"{cache_bytes / 1e9:.3g} GB"
    mapped = cache_bytes > settings.cache_budget_gb * 1e9
    changing = _changes(experiment)
    against = None
    if boundary is None:
        against = "the first stage learns: there is no frozen prefix"
    elif settings.cache == "off":
        against = "plan.cache is off"
    elif changing:
        against = changing
    elif passes <= 1 and settings.cache != "on":
        against = "no example is trained on twice"
    elif settings.cache != "on" and not drawn and (saved := prefix * (1 - 1 / passes)) < _WORTH:
        against = f"keeping {size} of activations would save {saved:.1%} of the operations; plan.cache=on does so"
    elif mapped and cache_bytes > settings.cache_disk_gb * 1e9:
        against = (
            f"the activations take {size}, plan.cache_budget_gb is {settings.cache_budget_gb:g}, "
            f"plan.cache_disk_gb is {settings.cache_disk_gb:g}"
        )
    if against and settings.cache == "on":
        raise UserError(f"plan.cache=on is not possible: {against}")
    if against and drawn and passes > 1:
        raise UserError(f"plan.cached_views={settings.cached_views} is not possible: {against}")
    if against:
        return Plan(boundary, False, against, cache_bytes)
    what = f"{drawn} views of each training image, drawn once" if drawn else "the same activations in every epoch"
    above = f"a memory-mapped file, being above plan.cache_budget_gb={settings.cache_budget_gb:g}"
    reason = f"{what}; {size} in {above if mapped else 'memory'}"
    return Plan(boundary, True, reason, cache_bytes, mapped, drawn)


def _changes(experiment: Experiment) -> str | None:
    """Returns what makes the input of an example another one each time, if anything does, and what can be done."""
    if experiment.model.head.kind == "mlm":
        return "masking changes the input in every epoch"
    augment = _augment(experiment)
    if augment == "none" or experiment.plan.cached_views:
        return None
    return (
        f"data.augment={augment} changes the input in every epoch; plan.cached_views=4 keeps four views of each image"
    )


def _augment(experiment: Experiment) -> str:
    return getattr(experiment.data, "augment", "none")
