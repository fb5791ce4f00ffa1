"""What a training step keeps in the memory of each device, from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core

from jaxtl.models import kernels, stages
from jaxtl.training import flops, freeze, sharding, step
from jaxtl.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, but for the last.

    Attributes:
        devices: how many there are.
        parameters: trained and frozen ones, float32.
        optimizer: the optimiser's state.
        gradients: of the trained parameters.
        gathered: with `parallel.fsdp`, whole copies of divided parameters while they are used; all of them at the most.
        activations: what the forward pass leaves for the backward one, of the longest batch, attention's weights
            included, which cuDNN's fused attention does not keep. Beside it a step needs room to work in: a few times
            the largest activation.
        cache: kept activations of frozen stages, in the memory of each host.
    """

    devices: int
    parameters: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    cache: int

    @property
    def device(self) -> int:
        """All that is on a device."""
        return self.parameters + self.optimizer + self.gradients + self.gathered + self.activations


def of(this: Setup, devices: int) -> Memory:
    """Returns what a step of a run keeps on so many devices, which need not be there.

    Raises:
        UserError: the batch, or the mesh, cannot be divided among them.
    """
    sharding.check(this.experiment, devices)
    parts = this.experiment.parallel.fsdp
    learning, resting = freeze.partition(this.net.params, this.labels)
    state = jax.eval_shape(this.optimizer.init, learning)
    whole, divided = _bytes(this.net.params), _bytes(this.net.params, parts)
    rows = this.experiment.train.batch_size // devices // this.experiment.train.accumulate_steps
    return Memory(
        devices,
        divided,
        _bytes(state, parts),
        _bytes(learning, parts),
        whole - divided,
        _residuals(this, learning, resting, rows),
        this.plan.cache_bytes if this.plan.cached and not this.plan.mapped else 0,
    )


def _bytes(tree: Any, parts: int = 1) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size if sharding.divided_axis(leaf.shape, parts) is None else size // parts
    return total


def _residuals(this: Setup, learning: stages.Params, resting: stages.Params, rows: int) -> int:
    """Returns the bytes that a backward pass reads and that are neither parameters nor the batch."""
    settings = this.experiment.train
    length = max(this.lengths, default=getattr(this.experiment.data, "max_length", 0))
    batch = flops.abstract_batch(this.entering, rows, length)
    loss = step.loss(
        this.net.structure,
        freeze.frozen_stages(this.labels, this.net.stages),
        this.start,
        remat=settings.remat == "blocks",
    )

    def left(learning: stages.Params, resting: stages.Params, batch: step.Batch, key: jax.Array) -> list[Any]:
        _, backward, _ = jax.vjp(lambda params: loss(params, resting, batch, batch, key), learning, has_aux=True)
        return jax.tree.leaves(backward)

    with kernels.plain():
        jaxpr = jax.make_jaxpr(left)(learning, resting, batch, jax.eval_shape(lambda: jax.random.key(0))).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {variable for variable in jaxpr.outvars if isinstance(variable, core.Var) and variable not in given}
    return sum(math.prod(variable.aval.shape) * variable.aval.dtype.itemsize for variable in kept)
