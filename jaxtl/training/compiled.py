"""Steps compiled before they are needed, for every shape that their batches have."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxtl.data.listing import Examples, Ragged
from jaxtl.models import kernels, stages
from jaxtl.training.setup import Setup
from jaxtl.training.sharding import Layout

T = TypeVar("T")

BATCH = 2  # position of the batch among the arguments of every step


def compile_step(
    step: Any, before: tuple, dataset: Examples, batch_size: int, this: Setup, after: tuple = ()
) -> Callable:
    """Returns the jitted `step(*before, batch, *after)`, compiled for the batches of a data set.

    Args:
        step: jitted function.
        before, after: its other arguments, or abstract ones like them.
        dataset: what the batches are made of.
        batch_size: their rows.
        this: the run: lengths of the batches, where they lie, the precision of the step.
    """
    shapes = this.lengths if isinstance(dataset.inputs, Ragged) else (0,)
    lowered = [
        step.lower(*before, abstract_batch(dataset, batch_size, length, this.layout), *after) for length in shapes
    ]
    options = kernels.compiler_options(this.experiment.train.precision)
    with ThreadPoolExecutor() as threads:  # XLA compiles outside of Python's lock
        programs = threads.map(lambda one: one.compile(options), lowered)
        by_length = dict(zip(shapes, programs, strict=True))

    def call(*arguments: Any) -> Any:
        inputs = arguments[BATCH]["input"]
        length = inputs.values.shape[1] if isinstance(inputs, stages.Sequence) else 0
        return by_length[length](*arguments)

    return call


def behind(sent: Iterable[T], steps: int) -> Iterator[T]:
    """Yields results some steps after they were asked for: the device has work while the host deals with them."""
    pending: collections.deque[T] = collections.deque()
    for result in sent:
        pending.append(result)
        if len(pending) > steps:
            yield pending.popleft()
    yield from pending


def abstract_batch(dataset: Examples, batch_size: int, length: int, layout: Layout) -> dict[str, Any]:
    """Returns the shapes and dtypes of a batch that `layout.put_batch` returns."""

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=layout.by_row)

    if isinstance(dataset.inputs, Ragged):
        values = dataset.inputs.values
        inputs: Any = stages.Sequence(
            abstract((length, *values.shape[1:]), values.dtype),
            abstract((), jnp.int32),
        )
    else:
        inputs = abstract(dataset.inputs.shape[1:], dataset.inputs.dtype)
    asked = {"asked": abstract((), jnp.int32)} if layout.processes > 1 else {}
    return {
        **asked,
        "input": inputs,
        "label": abstract((), jnp.int32),
        "weight": abstract((), jnp.float32),
        "index": abstract((), jnp.int32),
    }
