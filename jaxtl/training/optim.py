"""The optimiser: optax transformations by name, one per freeze-rule group."""

from collections.abc import Mapping

import optax

from jaxtl.config import Optim
from jaxtl.errors import UserError, suggest


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then constant or decaying to zero at `steps`."""
    warmup = round(optim.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(optim.learning_rate),
        "linear": optax.linear_schedule(optim.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(optim.learning_rate, rest),
    }[optim.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, optim.learning_rate, warmup), after], [warmup])


def optimizer(optim: Optim, labels: Mapping[str, str], steps: int) -> optax.GradientTransformation:
    """Returns the transformation of the trainable parameters' gradients.

    Args:
        optim: what the experiment asks for.
        labels: the group of each trainable parameter, by path. Frozen ones are not among them, so that neither
            the optimiser's state nor the norm that clipping looks at knows of them.
        steps: length of the run, which the schedule decays over.

    Raises:
        UserError: a multiplier for a group that no freeze rule names.
    """
    groups = sorted(set(labels.values()))
    factors = dict(optim.multipliers)
    for group in factors:
        if group not in groups:
            raise UserError(
                f"optim.multipliers: no freeze rule trains a group {group!r}{suggest(group, groups)}; "
                f"groups: {', '.join(groups)}"
            )
    rate = schedule(optim, steps)
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
    # Biases, norms, tokens and position embeddings are left alone, as BERT and ViT do.
    return {path: path.endswith("/kernel") for path in params}
