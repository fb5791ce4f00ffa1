"""What a run costs, from shapes alone, see `operations`."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtl.data import buckets
from jaxtl.data.listing import Examples, Ragged
from jaxtl.models import stages
from jaxtl.training import freeze, operations, step
from jaxtl.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        once: of the frozen prefix, for everything that is cached, unless an earlier run left it; 0 where nothing is.
        step: of a training step; where batches have several lengths, the mean of an epoch.
        epoch: of an epoch's training steps.
        evaluation: of one pass over the held-out examples.
        run: of all training, and of the evaluations after it and in between.
    """

    once: int
    step: int
    epoch: int
    evaluation: int
    run: int


def of(this: Setup, splits: list[Any]) -> Flops:
    """Returns what a run costs.

    Args:
        this: the run.
        splits: training, held-out and perhaps test examples; of texts not tokenised yet each counts as the longest.
    """
    settings, steps = this.experiment.train, this.steps
    learning, resting = freeze.partition(this.net.params, this.labels)

    def forward(split: Any, inputs: Any, start: str | None, stop: str | None = None) -> int:
        run = step.forward(this.net.structure, step.unchanged, start, stop)
        size = settings.eval_batch_size

        def cost(length: int) -> int:
            return operations.count(run, learning, resting, abstract_batch(inputs, size, length))

        return _over(split, size, cost, this)

    def training(length: int) -> int:
        train, arguments = training_step(this, length)
        return operations.count(train, *arguments)

    entering = this.entering
    once = 0
    if this.plan.cached:
        views = [max(this.plan.views, 1), 1, 1]
        prefix = [forward(split, this.net.input, None, this.plan.boundary) for split in splits]
        once = sum(cost * count for cost, count in zip(prefix, views, strict=False))
    epoch = _over(splits[0], settings.batch_size, training, this)
    evaluation = forward(splits[1], entering, this.start)
    test = forward(splits[2], entering, this.start) if len(splits) == 3 else 0
    each = epoch / this.steps_per_epoch
    evaluations = math.ceil(steps / this.steps_per_epoch / settings.eval_every)
    if this.experiment.model.head.kind == "mlm":  # before training too
        evaluations += 1
    return Flops(once, round(each), epoch, evaluation, round(once + each * steps + evaluation * evaluations + test))


def training_step(this: Setup, length: int) -> tuple[Callable, tuple[Any, ...]]:
    """Returns the training step that the plan leaves, and abstract arguments: state, frozen parameters, batch, key.

    Args:
        this: the run.
        length: of the batch's texts, in word pieces; without meaning for images.
    """
    learning, resting = freeze.partition(this.net.params, this.labels)
    state = jax.eval_shape(lambda params: step.TrainState.create(params, this.optimizer), learning)
    batch = abstract_batch(this.entering, this.experiment.train.batch_size, length)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return this.train_step(step.unchanged, this.start), (state, resting, batch, key)


def _over(split: Any, batch_size: int, cost: Callable[[int], int], this: Setup) -> int:
    """Returns the cost of one pass, from that of a batch of a given length."""
    number, lengths = len(split.labels), None
    if isinstance(split, Examples):
        lengths = split.inputs.lengths if isinstance(split.inputs, Ragged) else split.token_counts
    if lengths is None:
        batches: Mapping[int, int] = {getattr(this.experiment.data, "max_length", 0): -(-number // batch_size)}
    else:
        grouped = buckets.group(lengths, this.lengths, batch_size, np.random.default_rng(0))
        batches = collections.Counter(length for _, length in grouped)
    return sum(cost(length) * count for length, count in batches.items())


def abstract_batch(inputs: Any, size: int, length: int) -> dict[str, Any]:
    """Returns an abstract batch of what `inputs` is one row of."""

    def rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)

    rowed = jax.tree.map(rows, inputs)
    answers = (size,)
    if isinstance(inputs, stages.Sequence):
        values = rowed.values
        rowed = rowed._replace(values=jax.ShapeDtypeStruct((size, length, *values.shape[2:]), values.dtype))
        if inputs.positions is not None:
            answers = rowed.positions.shape
    label, weight = (jax.ShapeDtypeStruct(answers, dtype) for dtype in (jnp.int32, jnp.float32))
    return {"input": rowed, "label": label, "weight": weight}
