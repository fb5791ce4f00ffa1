"""Activations at the freeze boundary, computed once: by this run, or by an earlier one that left them in files.

Of several processes each keeps those that it computes: its rows of the batches by which all examples are gone through.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jaxtl
from jaxtl import hosts, storage
from jaxtl.config import Images
from jaxtl.data import loader
from jaxtl.data.listing import Examples, Ragged
from jaxtl.errors import UserError
from jaxtl.models import presets, stages
from jaxtl.progress import say, track
from jaxtl.training import checkpoint, plan, step
from jaxtl.training.compiled import behind, compile_step
from jaxtl.training.setup import Setup
from jaxtl.training.store import Store

# Folded into the seed's key, so that views are drawn by themselves: 1 is that of the training steps.
_VIEWS_KEY = 2
_SPLITS = ("training", "held-out", "test")


@dataclasses.dataclass(frozen=True)
class Activations:
    """What training goes on from.

    Attributes:
        splits: each input replaced by its activations; those of sequences without padding.
        prepare: for batches of them, see `step.train_step`, from the stage after the boundary on.
        origin: whether this run computed any of them, or found all in files.
        bytes: space that they take here.
        seconds_compile: that compiling the prefix took.
    """

    splits: list[Examples]
    prepare: step.Prepare
    origin: Literal["computed", "loaded"]
    bytes: int
    seconds_compile: float


@dataclasses.dataclass(frozen=True)
class _Split:
    """Activations of one split, wanted.

    Attributes:
        name: for the person watching.
        examples: the raw ones.
        views: augmented views of each; 0: as they are.
        owners: the process that keeps each example's; None: this one, alone.
        places: `[n]`, of each example among those of its process.
        offsets: `[max(views, 1) * own + 1]`; the activations of this process's example i are
            `array[offsets[i] : offsets[i + 1]]`.
        shape: of the array.
        origins: what they depend on, see `origins`.
    """

    name: str
    examples: Examples
    views: int
    owners: np.ndarray | None
    places: np.ndarray
    offsets: np.ndarray
    shape: tuple[int, ...]
    origins: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names the array in the store."""
        return hashlib.sha256(json.dumps(self.origins, sort_keys=True).encode()).hexdigest()


def run_prefix(
    this: Setup, prepare: step.Prepare, params: stages.Params, frozen: stages.Params, splits: list[Examples]
) -> Activations | None:
    """Runs the frozen prefix once on every example, or loads what an earlier run that did the same has kept.

    Args:
        this: the run, whose plan says `cached`.
        prepare: of raw batches.
        params, frozen: trainable and frozen parameters by path.
        splits: the examples, those for training first.

    Returns:
        The activations; None where they are too large for memory and no file can be made: said.

    Raises:
        UserError: that, with `plan.cache=on` or `plan.cached_views`.
    """
    settings = this.experiment.plan
    folder = Path(settings.cache_dir).expanduser() if settings.cache_dir else storage.cache_folder() / "activations"
    if not hosts.first():  # some processes have a disk of their own, and others share one
        folder = folder / f"process-{hosts.index()}"
    store = Store(folder, settings.cache_disk_gb * 1e9)
    row = plan.kept(this.activations, settings.cache_dtype)
    wanted = _wanted(this, frozen, splits, row)
    prefix = _Prefix(this, prepare, params, frozen, splits[0])
    with contextlib.ExitStack() as stack:
        arrays = _load([None] * len(wanted), wanted, row.dtype, store, this)
        # Several processes of a run might wait for those of another which wait for them.
        if any(array is None for array in arrays) and settings.cache_disk_gb and hosts.count() == 1:
            stack.enter_context(store.alone(split.key for split in wanted))
            arrays = _load(arrays, wanted, row.dtype, store, this)  # which another run has made meanwhile
        loaded = [(split.name, array.nbytes) for split, array in zip(wanted, arrays, strict=True) if array is not None]
        if loaded:
            names, size = ", ".join(name for name, _ in loaded), f"{sum(size for _, size in loaded) / 1e9:.3g} GB"
            say(
                f"stages up to {this.plan.boundary} ran before for the {names} examples: {size} of activations from "
                f"{folder}"
            )
        missing = [split for split, array in zip(wanted, arrays, strict=True) if array is None]
        if missing:
            try:
                computed = _compute(missing, row.dtype, prefix, store, this)
            except _NoRoom as error:
                _refuse(f"{folder} cannot hold them: {error}", this)
                return None
            arrays = [computed.pop(0) if array is None else array for array in arrays]
    return Activations(
        [_with_inputs(split, array, this.activations) for split, array in zip(wanted, arrays, strict=True)],
        _preparation(row.dtype, stages.values(this.activations).dtype),
        "computed" if missing else "loaded",
        sum(array.nbytes for array in arrays),
        prefix.seconds_compile,
    )


def _load(
    found: list[np.ndarray | None], wanted: list[_Split], dtype: np.dtype, store: Store, this: Setup
) -> list[np.ndarray | None]:
    """Returns what was found and what is in the store by now; None where something is missing in any process."""
    arrays = [
        store.load(split.key, split.shape, dtype, mapped=this.plan.mapped) if array is None else array
        for split, array in zip(wanted, found, strict=True)
    ]
    everywhere = hosts.all_say([array is not None for array in arrays])
    return [array if said else None for array, said in zip(arrays, everywhere, strict=True)]


class _NoRoom(Exception):
    """No file can be made of what is too large for memory."""


def _refuse(reason: str, this: Setup) -> None:
    """Says that the activations are not kept, or raises UserError where they were asked for."""
    settings = this.experiment.plan
    against = (
        f"the activations take {this.plan.cache_bytes / 1e9:.3g} GB, plan.cache_budget_gb is "
        f"{settings.cache_budget_gb:g}, and {reason}"
    )
    if settings.cache == "on" or this.plan.views:
        asked = "plan.cache=on" if settings.cache == "on" else f"plan.cached_views={settings.cached_views}"
        raise UserError(f"{asked} is not possible: {against}; name another plan.cache_dir")
    say(f"{against}; the frozen stages run in every step")


def _compute(missing: list[_Split], dtype: np.dtype, run: Callable, store: Store, this: Setup) -> list[np.ndarray]:
    """Returns the activations of these splits, in memory or memory-mapped as planned, having put them in the store."""
    with contextlib.ExitStack() as stack:
        reserved, against = [], None
        if this.plan.mapped:
            try:  # for all splits before anything is computed
                for split in missing:
                    reserved.append(stack.enter_context(store.create(split.key, split.shape, dtype, split.origins)))
            except OSError as error:
                against = error.strerror or error
        if hosts.all_say([against is None]) == [False]:
            raise _NoRoom(against or "another process has no room")
        names = ", ".join(split.name for split in missing)
        size = sum(math.prod(split.shape) for split in missing) * dtype.itemsize / 1e9
        where = f"a memory-mapped file in {store.folder}" if reserved else "memory"
        say(f"stages up to {this.plan.boundary} run once for the {names} examples: {size:.3g} GB in {where}")
        arrays, lost = [], None
        for number, split in enumerate(missing):
            array = reserved[number].array if reserved else np.empty(split.shape, dtype)
            _fill(array, split, run, this)
            try:
                if reserved:
                    array = reserved[number].keep()
                elif this.experiment.plan.cache_disk_gb:
                    with store.create(split.key, split.shape, dtype, split.origins) as entry:
                        entry.fill(array)
                        entry.keep()
            except OSError as error:  # of several, the last is as good as any
                lost = error
            arrays.append(array)
    if lost:
        say(f"the activations are not kept for other runs in {store.folder}: {lost.strerror or lost}")
    return arrays


def _wanted(this: Setup, frozen: stages.Params, splits: list[Examples], row: jax.ShapeDtypeStruct) -> list[_Split]:
    prefix = _prefix(this)
    prefix_params = {path: value for path, value in frozen.items() if path.partition("/")[0] in prefix}
    weights = checkpoint.digest(prefix_params, this.layout.read)
    found = []
    index, processes = this.layout.shard
    for number, (examples, name) in enumerate(zip(splits, _SPLITS, strict=False)):
        views, count = 0 if number else this.plan.views, len(examples.labels)
        lengths = examples.inputs.lengths if isinstance(examples.inputs, Ragged) else None
        made_of = origins(this, weights, examples, views, row.dtype)
        owners, places, own = examples.owners, np.arange(count), slice(None)
        if processes > 1:
            if owners is None:  # texts, which all processes read
                owners = loader.owners(lengths, count, this.experiment.train.eval_batch_size, processes)
            places, own = loader.places(owners), owners == index
            made_of["process"] = [index, processes]
        if isinstance(this.activations, stages.Sequence):  # every token of a text, and not one vector for it
            offsets = np.concatenate([[0], np.cumsum(lengths[own])])
        else:
            offsets = np.arange(max(views, 1) * len(places[own]) + 1)
        shape = (int(offsets[-1]), *row.shape)
        found.append(_Split(name, examples, views, owners, places, offsets, shape, made_of))
    return found


def origins(this: Setup, weights: str, examples: Examples, views: int, dtype: np.dtype) -> dict[str, Any]:
    """Returns what the activations of a split depend on, to the last bit as far as that is known; a JSON-like dict.

    Args:
        this: the run.
        weights: digest of the prefix's parameters.
        examples: the raw ones.
        views: augmented views of each; 0: as they are.
        dtype: that they are kept in.
    """
    experiment, data = this.experiment, this.experiment.data
    inputs = examples.inputs
    raw = {"values": inputs.values, "offsets": inputs.offsets} if isinstance(inputs, Ragged) else {"values": inputs}
    preparation: dict[str, Any] = {}
    if isinstance(data, Images):
        preparation = {"image_size": experiment.model.image_size, "scale": data.scale}
    if views:
        preparation |= {"augment": data.augment, "views": views, "seed": experiment.train.seed}
    device = jax.devices()[0]
    return {
        "code": _code(),
        "weights": weights,
        "architecture": dataclasses.asdict(this.net.config),
        "stages": _prefix(this),
        "reads": _reads(this),
        "preparation": preparation,
        "precision": experiment.train.precision,
        "dtype": dtype.name,
        # Batches of another shape are rounded otherwise.
        "batch_size": experiment.train.eval_batch_size,
        "lengths": list(this.lengths),
        "inputs": checkpoint.digest(raw),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "device": [device.platform, device.device_kind, device.client.platform_version, jax.device_count()],
        "layout": dict(this.layout.mesh.shape) if this.layout.mesh else {},
        "host": _processor() if device.platform == "cpu" else [],
        "flags": [os.environ.get("XLA_FLAGS", ""), jax.config.jax_default_prng_impl],
    }


def _reads(this: Setup) -> list[Any]:
    """Returns what the head reads, and how many tokens of the last block, as far as the prefix computes no more."""
    head, prefix = this.experiment.model.head, _prefix(this)
    depth, leading = getattr(this.net.config, "depth", None), None
    if depth is not None and this.net.stages[depth] in prefix and this.experiment.plan.prune:
        leading = presets.leading(this.net.config, head.reads)
    return [head.reads if "features" in prefix else None, leading]


@functools.cache
def _code() -> str:
    """Returns a digest of jaxtl's code: another version of it may compute something else."""
    package = Path(jaxtl.__file__).parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(package.rglob("*.py")))).hexdigest()


def _processor() -> list[Any]:
    """Returns the name of the CPU, for which programs are made, and its cores, among which sums are divided."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return [line.partition(":")[2].strip(), cores]
    return [platform.processor(), cores]


def _prefix(this: Setup) -> list[str]:
    return list(this.net.stages[: this.net.stages.index(this.plan.boundary) + 1])


class _Prefix:
    """The frozen stages, compiled when they are first called: (batch, key) -> activations; `key` empty, or of one."""

    def __init__(
        self, this: Setup, prepare: step.Prepare, params: stages.Params, frozen: stages.Params, like: Examples
    ):
        self.seconds_compile = 0.0
        self._step = step.forward(this.net.structure, prepare, stop=this.plan.boundary, layout=this.layout)
        self._params, self._like, self._this = (params, frozen), like, this
        self._compiled: dict[int, Callable] = {}

    def __call__(self, batch: dict[str, Any], key: tuple[jax.Array, ...]) -> Any:
        if len(key) not in self._compiled:
            begun, size = time.perf_counter(), self._this.experiment.train.eval_batch_size
            self._compiled[len(key)] = compile_step(self._step, self._params, self._like, size, self._this, key)
            self.seconds_compile += time.perf_counter() - begun
        return self._compiled[len(key)](*self._params, batch, *key)


def _fill(array: np.ndarray, split: _Split, run: Callable, this: Setup) -> None:
    """Computes the activations of a split into `array`."""
    batch_size, count = this.experiment.train.eval_batch_size, len(split.examples.labels)
    passes, steps = max(split.views, 1), loader.steps_per_epoch(count, batch_size)
    own = (len(split.offsets) - 1) // passes  # examples of this process
    batches = loader.batches(
        split.examples, batch_size, seed=None, epochs=passes, lengths=this.lengths, shard=this.layout.shard
    )
    views_key = jax.random.fold_in(jax.random.key(this.experiment.train.seed), _VIEWS_KEY)

    def outputs() -> Iterator[tuple[np.ndarray, Any]]:
        for number, batch in enumerate(track(batches, passes * steps, f"frozen stages, {split.name} examples")):
            view, place = divmod(number, steps)
            key = jax.random.fold_in(jax.random.fold_in(views_key, view), place)
            keys = (this.layout.put_key(key),) if split.views else ()
            rows = batch["index"]  # this process's
            yield np.where(rows >= 0, view * own + split.places[rows], -1), run(this.layout.put_batch(batch), keys)

    for rows, found in behind(outputs(), 1):
        values = this.layout.own_rows(stages.values(found))
        if isinstance(found, stages.Sequence):
            for value, row in zip(values, rows, strict=True):
                if row >= 0:
                    start, stop = split.offsets[row], split.offsets[row + 1]
                    array[start:stop] = value[: stop - start]
        else:
            array[rows[rows >= 0]] = values[rows >= 0]


def _with_inputs(split: _Split, array: np.ndarray, activations: Any) -> Examples:
    examples = split.examples
    return dataclasses.replace(
        examples,
        inputs=Ragged(array, split.offsets) if isinstance(activations, stages.Sequence) else array,
        token_counts=examples.inputs.lengths if isinstance(examples.inputs, Ragged) else None,
        views=max(split.views, 1),
        owners=split.owners,
    )


def _preparation(kept: np.dtype, computed: np.dtype) -> step.Prepare:
    """Returns what makes a batch of activations as the model computes them, of one as they are kept."""
    if kept == computed:
        return step.unchanged

    def prepare(batch: step.Batch, key: jax.Array | None) -> step.Batch:
        del key
        inputs = batch["input"]
        values = stages.values(inputs).astype(computed)
        return {**batch, "input": inputs._replace(values=values) if isinstance(inputs, stages.Sequence) else values}

    return prepare
