"""The execution plan: what of a run needs to be computed only once.

The leading stages in which nothing learns, and nothing is random since frozen stages run without dropout, give the same
activations for an example in every epoch. Where the input is the same too, they are computed once and kept.
"""

import dataclasses
from collections.abc import Mapping, Sequence

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


def make(experiment: Experiment, boundary: str | None, cache_bytes: int, passes: float) -> Plan:
    """Returns the plan of an experiment. Pure.

    Args:
        experiment: what is asked for.
        boundary: the last stage of the frozen prefix.
        cache_bytes: memory that the activations after the boundary take, of all examples of all splits.
        passes: over the training examples, in the whole run.

    Raises:
        UserError: `plan.cache=on` where that cannot be.
    """
    settings = experiment.plan
    changing = _changes(experiment)
    against = None
    if boundary is None:
        against = "the first stage learns: there is no frozen prefix"
    elif settings.cache == "off":
        against = "plan.cache is off"
    elif changing:
        against = f"{changing} in every epoch"
    elif passes <= 1 and settings.cache != "on":
        against = "no example is trained on twice"
    elif cache_bytes > settings.cache_budget_gb * 1e9:
        against = (
            f"the activations take {cache_bytes / 1e9:.2f} GB, plan.cache_budget_gb is {settings.cache_budget_gb:g}"
        )
    if against and settings.cache == "on":
        raise UserError(f"plan.cache=on is not possible: {against}")
    return Plan(boundary, against is None, against or "the same activations in every epoch", cache_bytes)


def _changes(experiment: Experiment) -> str | None:
    """Returns what makes the input of an example another one each time, if anything does."""
    if experiment.model.head.kind == "mlm":
        return "masking changes the input"
    augment = getattr(experiment.data, "augment", "none")
    return f"data.augment={augment} changes the input" if augment != "none" else None
