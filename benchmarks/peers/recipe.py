"""What all peers take from an experiment in the same way, and what none of them does."""

import dataclasses
import math

from jaxtl.config import Experiment, Text
from jaxtl.training.freeze import Rules


@dataclasses.dataclass(frozen=True)
class Learning:
    """What learns.

    Attributes:
        first: the first stage that learns; None where all do.
        backbone: optimiser group of what learns in the backbone; None where nothing does.
        head: optimiser group of the head.
    """

    first: str | None
    backbone: str | None
    head: str


def learning(rules: Rules) -> Learning:
    """Returns what learns by freeze rules of the form "from a stage on" or "everything, the head as a group".

    Raises:
        ValueError: rules of another form.
    """
    match rules:
        case ((".*", str(group)),):
            return Learning(None, group, group)
        case (("head..", str(head)), (".*", backbone)):
            return Learning(None if backbone else "head", backbone, head)
        case ((str(pattern), str(group)), (".*", None)) if pattern.endswith("..") and len(pattern) > 2:
            return Learning(pattern.removesuffix(".."), group, group)
    raise ValueError(f"the peers freeze everything before a stage, or nothing; not {rules}")


def family(experiment: Experiment) -> str:
    """Returns which family of models this is: `text`, `vgg` or `dinov2`, as in the names of the modules beside this.

    Raises:
        ValueError: the experiment asks for something that the peers do not do.
    """
    model, data, train, optim = experiment.model, experiment.data, experiment.train, experiment.optim
    found = "text" if isinstance(data, Text) else {"flatten": "vgg", "cls": "dinov2"}.get(model.head.reads, "")
    heads = {"text": (("fc", "cls"), ("bigru", "sequence")), "vgg": (("mlp", "flatten"),), "dinov2": (("mlp", "cls"),)}
    groups = learning(experiment.freeze)
    unknown = set(dict(optim.multipliers)) - {groups.backbone, groups.head}
    does = {
        f"model.head={model.head.kind} on {model.head.reads}": (model.head.kind, model.head.reads)
        in heads.get(found, ()),
        f"model.head.init={model.head.init}": model.head.init == "zero",
        f"data.augment={getattr(data, 'augment', 'none')}": getattr(data, "augment", "none") == "none",
        f"data.scale={getattr(data, 'scale', 'unit')}": getattr(data, "scale", "unit") in ("unit", "imagenet"),
        f"optim.name={optim.name}": optim.name in ("adam", "adamw"),
        f"optim.multipliers={optim.multipliers}": not unknown,
        f"train.max_steps={train.max_steps}": train.max_steps is None,
        f"train.accumulate_steps={train.accumulate_steps}": train.accumulate_steps == 1,
        f"train.remat={train.remat}": train.remat == "none",
    }
    if missing := [what for what, done in does.items() if not done]:
        raise ValueError(f"the peers do not do {'; '.join(missing)}")
    return found


def rates(experiment: Experiment, width: int | None) -> dict[str, float]:
    """Returns the peak learning rate of each optimiser group. `width` is the model's, None where it has no single one.

    Raises:
        ValueError: the rate is to fit the width, and there is none.
    """
    optim, groups = experiment.optim, learning(experiment.freeze)
    if optim.width and width is None:
        raise ValueError(f"optim.width={optim.width}, and this backbone has no single width")
    peak = optim.learning_rate * optim.width / width if optim.width else optim.learning_rate
    factors = dict(optim.multipliers)
    return {group: peak * factors.get(group, 1.0) for group in (groups.backbone, groups.head) if group}


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch, a short last one among them."""
    return math.ceil(examples / batch_size)


def warmup_steps(experiment: Experiment, steps: int) -> int:
    """Returns the number of steps with a rising rate, of `steps` in all."""
    return round(experiment.optim.warmup * steps)


def evaluates(experiment: Experiment, epoch: int) -> bool:
    """Returns whether the model is evaluated after this epoch, counted from 1."""
    return epoch % experiment.train.eval_every == 0 or epoch == experiment.train.epochs
