"""The execution plan: what of a run needs to be computed only once.

The leading stages in which nothing learns, and nothing is random since frozen stages run without dropout, give the same
activations for an example in every epoch. Where the input is the same too, they are computed once and kept.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from jaxtl.config import Experiment
from jaxtl.errors import UserError
from jaxtl.training import freeze


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done once.

    Attributes:
        boundary: the last stage of the frozen prefix; None where the first stage learns.
        cached: whether the activations after the boundary are computed once and kept in memory.
        reason: why, or why not.
        cache_bytes: memory that they take, or would take.
    """

    boundary: str | None
    cached: bool
    reason: str
    cache_bytes: int


def boundary(labels: Mapping[str, str], stages: Sequence[str]) -> str | None:
    """Returns the last of the leading stages in which nothing learns, None where the first one learns."""
    frozen = freeze.frozen_stages(labels, stages)
    last = None
    for stage in stages:
        if stage not in frozen:
            return last
        last = stage
    raise ValueError("nothing learns")  # label_params does not let this pass


def make(
    experiment: Experiment,
    boundary: str | None,
    activations: jax.ShapeDtypeStruct | None,
    examples: int,
    passes: float,
) -> Plan:
    """Returns the plan of an experiment. Pure.

    Args:
        experiment: what is asked for.
        boundary: the last stage of the frozen prefix.
        activations: of one example, after the boundary; None where there is no boundary.
        examples: number of examples, training and evaluation together.
        passes: over the training examples, in the whole run.

    Raises:
        UserError: `plan.cache=on` where that cannot be.
    """
    settings = experiment.plan
    size = math.prod(activations.shape) * activations.dtype.itemsize * examples if activations else 0
    budget = settings.cache_budget_gb * 1e9
    against = None
    if boundary is None:
        against = "the first stage learns: there is no frozen prefix"
    elif settings.cache == "off":
        against = "plan.cache is off"
    elif experiment.data.augment != "none":
        against = f"data.augment={experiment.data.augment} changes the input in every epoch"
    elif passes <= 1 and settings.cache != "on":
        against = "no example is trained on twice"
    elif size > budget:
        against = f"the activations take {size / 1e9:.2f} GB, plan.cache_budget_gb is {settings.cache_budget_gb:g}"
    if against and settings.cache == "on":
        raise UserError(f"plan.cache=on is not possible: {against}")
    return Plan(boundary, against is None, against or "the same activations in every epoch", size)
