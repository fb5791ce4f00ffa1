"""Where arrays lie: one mesh of all devices, over which batches are divided and parameters copied or divided.

The mesh has two axes. A batch is divided over both. A parameter, its optimiser state and its gradient are copied along
`data`; along `fsdp` they are divided too, each along its largest axis that can be (Rajbhandari et al. 2020,
arXiv:1910.02054, stage 3; Zhao et al. 2023, arXiv:2304.11277), and gathered where they are used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtl.config import Experiment
from jaxtl.errors import UserError

DATA, FSDP = "data", "fsdp"
DIVIDED_FROM = 2**14  # elements; a smaller parameter costs more to gather than to keep


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what lies where on it.

    Attributes:
        mesh: axes `data` and `fsdp`; None: one device, the one that JAX takes by default.
    """

    mesh: Mesh | None = None

    def put(self, state: Any) -> Any:
        """Returns parameters, or anything shaped like them, on their devices. Every process has the same values."""
        if self.mesh is None:
            return jax.device_put(state)

        def place(x: Any, sharding: NamedSharding) -> jax.Array:
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(place, state, self._divided(state))

    def put_batch(self, batch: Mapping[str, Any], asked: int = 0) -> dict[str, Any]:
        """Returns a batch on its devices; of each process its own rows, see `jaxtl.data.loader.batches`.

        Of several processes, `asked` travels with it: 1, this one would stop; 2, save; 3, both. What other processes
        hold of this one's rows is fetched from them.
        """
        own = {name: value for name, value in batch.items() if name != "rows"}
        if self.mesh is None:
            return jax.device_put(own)
        if self.processes > 1:
            own["asked"] = np.full(len(own["label"]), asked, np.int32)
        by_row = self.by_row
        placed = jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_row, x), own)
        if "source" in placed:
            placed["input"] = _rows(self.mesh)(placed["input"], placed.pop("source"))
        return placed

    def put_key(self, key: jax.Array) -> jax.Array:
        """Returns a random key on all devices."""
        if self.mesh is None:
            return key
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        data = np.asarray(jax.random.key_data(key))
        placed = jax.make_array_from_callback(data.shape, everywhere, lambda index: data[index])
        return jax.jit(jax.random.wrap_key_data, out_shardings=everywhere)(placed)

    def read(self, x: Any) -> np.ndarray:
        """Returns an array whole, in every process; on a CPU it may be the device's own memory."""
        if self.processes > 1:
            x = _whole(self.mesh)(x)
        elif isinstance(x, jax.Array) and (self.mesh or jax.default_backend() != "cpu"):
            x = x.copy()  # an array keeps, as long as it lives, what was read of it on the host
        return np.asarray(x)

    def own_rows(self, x: jax.Array) -> np.ndarray:
        """Returns those rows of an array that are on this process's devices, in order; `x` lies as a batch does."""
        if self.processes == 1:
            return np.asarray(x)
        parts = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in parts])

    def host(self, state: Any) -> Any:
        """Returns whole copies of arrays, in every process."""
        return jax.tree.map(lambda x: np.array(self.read(x)), state)

    @property
    def processes(self) -> int:
        """How many processes have devices of the mesh."""
        return jax.process_count()

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count) of the part of every batch that is this process's."""
        return jax.process_index(), jax.process_count()

    @property
    def by_row(self) -> NamedSharding | None:
        """Where the rows of a batch lie."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec((DATA, FSDP)))

    def divided(self, state: Any) -> Any:
        """Inside a compiled function: has a result lie where `put` puts what is shaped like it."""
        return state if self.mesh is None else jax.lax.with_sharding_constraint(state, self._divided(state))

    def gathered(self, params: Any) -> Any:
        """Inside a compiled function: has every device have all of it. The gradient is divided again."""
        if self.mesh is None:
            return params
        return jax.lax.with_sharding_constraint(params, NamedSharding(self.mesh, PartitionSpec()))

    def by_rows(self, rows: Any) -> Any:
        """Inside a compiled function: has every device have its part of the rows of something, as of a batch."""
        return rows if self.mesh is None else jax.lax.with_sharding_constraint(rows, self.by_row)

    def _divided(self, state: Any) -> Any:
        parts = self.mesh.shape[FSDP]
        return jax.tree.map(lambda x: NamedSharding(self.mesh, spec(x.shape, parts)), state)


@functools.cache
def _whole(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns what gathers an array on every device; one function, so that each shape is compiled once."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _rows(mesh: Mesh) -> Callable[[Any, jax.Array], Any]:
    """Returns what picks rows, wherever they lie, of all arrays of a tree."""

    def pick(tree: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), tree)  # none is out of range

    return jax.jit(pick, out_shardings=NamedSharding(mesh, PartitionSpec((DATA, FSDP))))


def spec(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """Returns how an array is divided over the `fsdp` axis of so many devices: along one axis, or not at all."""
    axis = divided_axis(shape, parts)
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, FSDP)


def divided_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """Returns the largest axis that `parts` divides, of several the last; None for what is small or has none."""
    if parts == 1 or math.prod(shape) < DIVIDED_FROM:
        return None
    axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
    return max(axes, key=lambda axis: (shape[axis], axis), default=None)


def layout(experiment: Experiment) -> Layout:
    """Returns the layout that an experiment asks for, on the devices that there are.

    Raises:
        UserError: there are fewer devices, or something does not divide.
    """
    there, settings = jax.devices(), experiment.parallel
    wanted = len(there) if settings.devices is None else settings.devices
    if wanted > len(there):
        raise UserError(f"parallel.devices={wanted}: there are {len(there)}; set it to that or less, or to all")
    check(experiment, wanted)
    if wanted == jax.process_count() == 1:
        return Layout()
    if wanted < len(there) and jax.process_count() > 1:
        raise UserError(f"parallel.devices={wanted}: of several processes every device, {len(there)}, has a part")
    devices = np.array(there[:wanted]).reshape(-1, settings.fsdp)  # in the order of the processes
    return Layout(Mesh(devices, (DATA, FSDP)))


def check(experiment: Experiment, devices: int) -> None:
    """Raises UserError where batches, or the mesh, cannot be divided among so many devices."""
    fsdp, settings = experiment.parallel.fsdp, experiment.train
    if devices % fsdp:
        fitting = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(f"parallel.fsdp={fsdp} does not divide {devices} devices; set it to one of {fitting}")
    parts = devices * settings.accumulate_steps
    for field, size, unit in (
        ("train.batch_size", settings.batch_size, parts),
        ("train.eval_batch_size", settings.eval_batch_size, devices),
    ):
        if size % unit:
            lower, upper = size // unit * unit, -(-size // unit) * unit
            times = f" in train.accumulate_steps={settings.accumulate_steps} parts" if unit > devices else ""
            raise UserError(
                f"{field}={size} cannot be divided among {devices} devices{times}; the nearest that can: "
                + " and ".join(str(n) for n in (lower, upper) if n)
            )
