"""A model is a list of named stages; it can run from any one to any other.

The names are the first part of every parameter's path (`block_12/attention/query/kernel`), so that freezing, the
execution plan and the weight tables all speak of the same thing. Parameters are handled as a flat dict by path.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

Params = dict[str, Any]
"""Parameters by path: arrays, or `jax.ShapeDtypeStruct` for an abstract model."""


class Sequence(NamedTuple):
    """A batch of sequences of different lengths, filled up at the end: what the stages of text models take and return.

    Attributes:
        values: [batch, length, ..]: token ids int32 at the input, [batch, length, width] in the compute dtype after.
        lengths: int32 [batch], each at least 1. What lies beyond an example's length means nothing and never
            influences what lies within.
        positions: int32 [batch, read]: positions that the head reads (masked language modelling), handed on by every
            stage; None where it reads others.
    """

    values: jax.Array
    lengths: jax.Array
    positions: jax.Array | None = None


def values(x: "Sequence | jax.Array") -> jax.Array:
    """Returns the activations [batch, length, width] of a sequence, or of what is an array already."""
    return x.values if isinstance(x, Sequence) else x


class Staged(nnx.Module):
    """A model whose attributes named in `stages` are called in that order, each on the last one's output.

    A stage is a callable `(activations, rng) -> activations`; `rng` is None where nothing is random.
    """

    def __init__(self, stages: Iterable[tuple[str, nnx.Module]]):
        stages = tuple(stages)
        self.stages = tuple(name for name, _ in stages)
        for name, module in stages:
            setattr(self, name, module)

    def __call__(
        self,
        x: Any,
        *,
        start: str | None = None,
        stop: str | None = None,
        rng: jax.Array | None = None,
        deterministic: Collection[str] = (),
        remat: bool = False,
    ) -> Any:
        """Runs the stages from `start` to `stop`, both included.

        Args:
            x: the model's input, or what the stage before `start` returned.
            start, stop: stage names; None is the first and the last.
            rng: dropout key; None turns dropout off. A stage draws the same numbers whatever runs before it.
            deterministic: stages that never use dropout (the frozen ones).
            remat: a backward pass computes each stage's inner values again, and keeps only what enters it.
        """
        first = self.stages.index(start) if start else 0
        last = self.stages.index(stop) if stop else len(self.stages) - 1
        keys = None if rng is None else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(last + 1))
        for index in range(first, last + 1):
            name = self.stages[index]
            key = None if keys is None or name in deterministic else keys[index]
            stage = getattr(self, name)
            x = jax.checkpoint(lambda x, key, stage=stage: stage(x, key))(x, key) if remat else stage(x, key)
        return x


def abstract(build: Callable[[nnx.Rngs], Staged]) -> tuple[nnx.GraphDef, Params, tuple[str, ...]]:
    """Returns the structure, the abstract parameters by path and the stage names of a model; computes nothing."""
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    structure, state = nnx.split(model)
    return structure, flatten(state), model.stages


def initialize(build: Callable[[nnx.Rngs], Staged], key: jax.Array, paths: Collection[str]) -> Params:
    """Returns fresh values for the parameters named in `paths`; what is not asked for is not computed."""

    def fresh(key):
        params = flatten(nnx.state(build(nnx.Rngs(key))))
        return {path: params[path] for path in paths}

    return jax.jit(fresh)(key)


def bind(structure: nnx.GraphDef, params: Mapping[str, Any]) -> Staged:
    """Returns the model with these parameters. Free inside a compiled function."""
    return nnx.merge(structure, traverse_util.unflatten_dict(dict(params), sep="/"))


def flatten(state: nnx.State) -> Params:
    """Returns an nnx state as a flat dict by path."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(state), sep="/")
