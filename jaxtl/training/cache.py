"""Activations at the freeze boundary, computed once: by this run, or by an earlier one that left them in files."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jaxtl
from jaxtl import storage
from jaxtl.config import Images
from jaxtl.data import loader
from jaxtl.data.listing import Examples, Ragged
from jaxtl.errors import UserError
from jaxtl.models import stages
from jaxtl.progress import say, track
from jaxtl.training import checkpoint, plan, step
from jaxtl.training.compiled import compile_step
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
        bytes: space that they take.
    """

    splits: list[Examples]
    prepare: step.Prepare
    origin: Literal["computed", "loaded"]
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Split:
    """Activations of one split, wanted.

    Attributes:
        name: for the person watching.
        examples: the raw ones.
        views: augmented views of each; 0: as they are.
        offsets: `[max(views, 1) * n + 1]`; the activations of example i are `array[offsets[i] : offsets[i + 1]]`.
        shape: of the array.
        origins: what they depend on, see `origins`.
    """

    name: str
    examples: Examples
    views: int
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
        UserError: that, with `plan.cache=on`.
    """
    settings, boundary = this.experiment.plan, this.plan.boundary
    folder = Path(settings.cache_dir).expanduser() if settings.cache_dir else storage.cache_folder() / "activations"
    store = Store(folder, settings.cache_disk_gb * 1e9)
    row = plan.kept(this.activations, settings.cache_dtype)
    wanted = _wanted(this, frozen, splits, row)
    arrays = [store.load(split.key, split.shape, row.dtype, mapped=this.plan.mapped) for split in wanted]
    missing = [split for split, array in zip(wanted, arrays, strict=True) if array is None]
    loaded = [(split.name, array.nbytes) for split, array in zip(wanted, arrays, strict=True) if array is not None]
    if loaded:
        names, size = ", ".join(name for name, _ in loaded), sum(size for _, size in loaded) / 1e9
        say(f"stages up to {boundary} ran before for the {names} examples: {size:.3g} GB of activations from {folder}")
    if missing:
        try:
            computed = _compute(missing, row.dtype, _compiled(this, prepare, params, frozen, splits[0]), store, this)
        except _NoRoom as error:
            against = (
                f"the activations take {this.plan.cache_bytes / 1e9:.3g} GB, plan.cache_budget_gb is "
                f"{settings.cache_budget_gb:g}, and {folder} cannot hold them: {error}"
            )
            if settings.cache == "on":
                raise UserError(f"plan.cache=on is not possible: {against}; name another plan.cache_dir") from None
            say(f"{against}; the frozen stages run in every step")
            return None
        arrays = [computed.pop(0) if array is None else array for array in arrays]
    return Activations(
        [_with_inputs(split, array, this.activations) for split, array in zip(wanted, arrays, strict=True)],
        _preparation(row.dtype, stages.values(this.activations).dtype),
        "computed" if missing else "loaded",
        sum(array.nbytes for array in arrays),
    )


class _NoRoom(Exception):
    """No file can be made of what is too large for memory."""


def _compute(missing: list[_Split], dtype: np.dtype, run: Callable, store: Store, this: Setup) -> list[np.ndarray]:
    """Returns the activations of these splits, in memory or memory-mapped as planned, having put them in the store."""
    with contextlib.ExitStack() as stack:
        reserved = []
        if this.plan.mapped:
            try:  # for all splits before anything is computed
                for split in missing:
                    reserved.append(stack.enter_context(store.create(split.key, split.shape, dtype, split.origins)))
            except OSError as error:
                raise _NoRoom(error.strerror or error) from None
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
                        entry.array[...] = array
                        entry.keep()
            except OSError as error:  # of several, the last is as good as any
                lost = error
            arrays.append(array)
    if lost:
        say(f"the activations are not kept for other runs in {store.folder}: {lost.strerror or lost}")
    return arrays


def _wanted(this: Setup, frozen: stages.Params, splits: list[Examples], row: jax.ShapeDtypeStruct) -> list[_Split]:
    weights = checkpoint.digest({path: value for path, value in frozen.items() if path.split("/")[0] in _prefix(this)})
    found = []
    for number, (examples, name) in enumerate(zip(splits, _SPLITS, strict=False)):
        views = 0 if number else this.plan.views
        if isinstance(this.activations, stages.Sequence):  # every token of a text, and not one vector for it
            offsets = examples.inputs.offsets
        else:
            offsets = np.arange(max(views, 1) * len(examples.labels) + 1)
        made_of = origins(this, weights, examples, views, row.dtype)
        found.append(_Split(name, examples, views, offsets, (int(offsets[-1]), *row.shape), made_of))
    return found


def origins(this: Setup, weights: str, examples: Examples, views: int, dtype: np.dtype) -> dict[str, Any]:
    """Returns all that the activations of a split depend on, to the last bit, and nothing else; a JSON-like dict.

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
        "reads": experiment.model.head.reads,  # the last block computes what the head reads, and no more
        "prune": experiment.plan.prune,
        "preparation": preparation,
        "precision": experiment.train.precision,
        "dtype": dtype.name,
        # Batches of another shape are rounded otherwise.
        "batch_size": experiment.train.eval_batch_size,
        "lengths": list(this.lengths),
        "inputs": checkpoint.digest(raw),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
        "device": [device.platform, device.device_kind, device.client.platform_version, jax.device_count()],
    }


@functools.cache
def _code() -> str:
    """Returns a digest of the code that computes activations: another version of it may compute something else."""
    package = Path(jaxtl.__file__).parent
    files = (package / "data" / "images.py", *sorted((package / "models").glob("*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _prefix(this: Setup) -> list[str]:
    return list(this.net.stages[: this.net.stages.index(this.plan.boundary) + 1])


def _compiled(
    this: Setup, prepare: step.Prepare, params: stages.Params, frozen: stages.Params, like: Examples
) -> Callable[[dict[str, Any], tuple[jax.Array, ...]], Any]:
    """Returns `run(batch, key)`: the prefix, compiled when it is first called; `key` is empty, or of one key."""
    prefix = step.forward(this.net.structure, prepare, stop=this.plan.boundary)
    batch_size = this.experiment.train.eval_batch_size

    @functools.cache
    def compiled(drawn: bool) -> Callable:
        key = (jax.random.key(0),) if drawn else ()
        return compile_step(prefix, (params, frozen), like, batch_size, this.lengths, key)

    def run(batch: dict[str, Any], key: tuple[jax.Array, ...]) -> Any:
        return compiled(bool(key))(params, frozen, batch, *key)

    return run


def _fill(array: np.ndarray, split: _Split, run: Callable, this: Setup) -> None:
    """Computes the activations of a split into `array`."""
    batch_size, count = this.experiment.train.eval_batch_size, len(split.examples.labels)
    passes, steps = max(split.views, 1), loader.steps_per_epoch(count, batch_size)
    batches = loader.batches(split.examples, batch_size, seed=None, epochs=passes, lengths=this.lengths)
    views_key = jax.random.fold_in(jax.random.key(this.experiment.train.seed), _VIEWS_KEY)
    sent: collections.deque[tuple[np.ndarray, Any]] = collections.deque()

    def write(rows: np.ndarray, outputs: Any) -> None:
        values = jax.device_get(stages.values(outputs))
        if not isinstance(outputs, stages.Sequence):
            array[rows[rows >= 0]] = values[rows >= 0]
            return
        for found, row in zip(values, rows, strict=True):
            if row >= 0:
                start, stop = split.offsets[row], split.offsets[row + 1]
                array[start:stop] = found[: stop - start]

    for number, batch in enumerate(track(batches, passes * steps, f"frozen stages, {split.name} examples")):
        view, place = divmod(number, steps)
        key = (jax.random.fold_in(jax.random.fold_in(views_key, view), place),) if split.views else ()
        rows = np.where(batch["index"] >= 0, view * count + batch["index"], -1)
        sent.append((rows, run(jax.device_put(batch), key)))
        if len(sent) > 1:  # the device computes the next batch while this one is written
            write(*sent.popleft())
    for one in sent:
        write(*one)


def _with_inputs(split: _Split, array: np.ndarray, activations: Any) -> Examples:
    examples = split.examples
    if isinstance(activations, stages.Sequence):
        return dataclasses.replace(examples, inputs=Ragged(array, split.offsets))
    counts = examples.inputs.lengths if isinstance(examples.inputs, Ragged) else None
    return dataclasses.replace(examples, inputs=array, token_counts=counts, views=max(split.views, 1))


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
