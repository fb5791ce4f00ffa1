"""The optimiser: optax transformations by name, one per freeze-rule group."""

from collections.abc import Mapping

import optax

from jaxtl.config import Optim
from jaxtl.errors import UserError, suggest


def peak_rate(optim: Optim, width: int | None) -> float:
    """Returns the highest learning rate of a run.

    Args:
        optim: what the experiment asks for.
        width: of the model; None where it has no single one.

    Raises:
        UserError: the rate is to fit the width, and there is none.
    """
    if not optim.width:
        return optim.learning_rate
    if width is None:
        raise UserError(f"optim.width={optim.width}: this backbone has no single width; --set optim.width=0")
    return optim.learning_rate * optim.width / width


def schedule(optim: Optim, steps: int, width: int | None = None) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then constant or decaying to zero at `steps`."""
    warmup = round(optim.warmup * steps)
    rest = max(steps - warmup, 1)
    peak = peak_rate(optim, width)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[optim.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(
    optim: Optim, labels: Mapping[str, str], steps: int, width: int | None = None
) -> optax.GradientTransformation:
    """Returns the transformation of the trainable parameters' gradients.

    Args:
        optim: what the experiment asks for.
        labels: the group of each trainable parameter, by path. Frozen ones are not among them, so that neither
            the optimiser's state nor the norm that clipping looks at knows of them.
        steps: length of the run, which the schedule decays over.
        width: of the model; None where it has no single one.

    Raises:
        UserError: a multiplier for a group that no freeze rule names, or see `peak_rate`.
    """
    groups = sorted(set(labels.values()))
    factors = dict(optim.multipliers)
    for group in factors:
        if group not in groups:
            raise UserError(
                f"optim.multipliers: no freeze rule trains a group {group!r}{suggest(group, groups)}; "
                f"groups: {', '.join(groups)}"
            )
    rate = schedule(optim, steps, width)
    by_group = {group: _transform(optim, rate, factors.get(group, 1.0)) for group in groups}
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    return optax.chain(*clip, optax.multi_transform(by_group, dict(labels)))


def _transform(optim: Optim, rate: optax.Schedule, factor: float) -> optax.GradientTransformation:
    def scaled(step):
        return factor * rate(step)

    if optim.name == "adam":
        return optax.adam(scaled)
    if optim.name == "adamw":
        return optax.adamw(scaled, weight_decay=optim.weight_decay, mask=_decays)
    return optax.sgd(scaled, momentum=0.9, nesterov=True)


def _decays(params: Mapping[str, object]) -> dict[str, bool]:
    # Of dense layers, convolutions and the GRU; biases, norms, tokens and embeddings are left alone.
    return {path: path.endswith("kernel") for path in params}
