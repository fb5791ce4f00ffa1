"""What a run costs, from shapes alone: the multiplications and additions of its matrix products and convolutions.

All else (normalisation, activations, the optimiser) is linear in what the products make, a few per cent of them.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from jaxtl.data import buckets
from jaxtl.data.listing import Examples, Ragged
from jaxtl.models import kernels, stages
from jaxtl.training import freeze, step
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


def count(function: Callable, *args: Any) -> int:
    """Returns the floating-point operations of a function's matrix products and convolutions; computes nothing.

    A loop whose number of turns is not known counts as one turn, of a choice the dearest branch.

    Args:
        function: traceable.
        args: its arguments, or abstract ones like them.
    """
    with kernels.plain():  # the same count on every backend
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # A gradient that nobody asked for is in the program as it was traced, and in none that is compiled.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


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
        return _over(
            split, size, lambda length: count(run, learning, resting, abstract_batch(inputs, size, length)), this
        )

    def training(length: int) -> int:
        train, arguments = training_step(this, length)
        return count(train, *arguments)

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


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_OWN.get(equation.primitive.name, _inner)(equation) for equation in jaxpr.eqns)


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """Without the products with padding, and with the zeros that a dilated operand is filled up with."""
    given, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel, result = (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    pairs = 1  # of a position of the result and one of the kernel that meet a value of the image
    for axis, (low, _) in enumerate(given["padding"]):
        outputs = np.arange(result[numbers.out_spec[2 + axis]])[:, None] * given["window_strides"][axis]
        steps = np.arange(kernel[numbers.rhs_spec[2 + axis]]) * given["rhs_dilation"][axis]
        position, apart = outputs + steps - low, given["lhs_dilation"][axis]
        length = (image[numbers.lhs_spec[2 + axis]] - 1) * apart + 1
        pairs *= int(np.sum((position >= 0) & (position < length) & (position % apart == 0)))
    batch, features = result[numbers.out_spec[0]], result[numbers.out_spec[1]]
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * pairs


def _inner(equation: core.JaxprEqn) -> int:
    """Returns the operations of the functions that an operation calls."""
    counts = [_count(inner) for inner in core.jaxprs_in_params(equation.params)]
    return max(counts) if equation.primitive.name == "cond" else sum(counts)


_OWN: dict[str, Callable[[core.JaxprEqn], int]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "scan": lambda equation: equation.params["length"] * _inner(equation),
}
