"""One run from start to end: data, network, compiled steps, epochs, evaluation, result."""

import collections
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtl.config import Experiment
from jaxtl.data import images, loader, sources
from jaxtl.errors import UserError
from jaxtl.evaluation import metrics
from jaxtl.progress import Bar, say, track
from jaxtl.training import cache, checkpoint, freeze, optim, run, step
from jaxtl.training.network import initial_params, locate
from jaxtl.training.setup import Setup, count, look

# Steps sent to the device ahead of the one whose metrics are read: enough to keep it busy.
_AHEAD = 2


def train(experiment: Experiment, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates as the experiment says, writes the run folder, and returns what result.json holds.

    Nothing is written before data, weights and rules have been found in order and the steps are compiled.

    Raises:
        UserError: something the user can mend.
    """
    started = time.perf_counter()
    settings = experiment.train
    this, drawn = look(experiment, locate, track)
    optimizer = optim.optimizer(experiment.optim, freeze.trained(this.labels), this.steps)
    params = initial_params(this.net, experiment.model, this.weights, settings.seed)
    params, frozen = freeze.partition(params, this.labels)
    # Decoding comes after all that can be wrong with the rest: it may take minutes.
    train_set, eval_set = sources.read(drawn, experiment.data.resize, experiment.model.image_size, track)
    seconds = collections.Counter()

    prepare, start = preparation(experiment), None
    if this.plan.cached:
        begun = time.perf_counter()
        train_set, eval_set = _compute_once(this, prepare, params, frozen, train_set, eval_set)
        prepare, start = _as_it_is, this.net.stages[this.net.stages.index(this.plan.boundary) + 1]
        seconds["cache"] += time.perf_counter() - begun

    state = step.TrainState.create(params, optimizer)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)  # the key itself made the initial values
    frozen_stages = freeze.frozen_stages(this.labels, this.net.stages)
    begun = time.perf_counter()
    train_step = step.train_step(this.net.structure, optimizer, prepare, frozen_stages, start)
    train_step = train_step.lower(state, frozen, _abstract_batch(train_set, settings.batch_size), key).compile()
    eval_step = step.forward(this.net.structure, prepare, start)
    eval_images = _abstract_batch(eval_set, settings.eval_batch_size)["image"]
    eval_step = eval_step.lower(state.params, frozen, eval_images).compile()
    seconds["compile"] += time.perf_counter() - begun
    trainable, total = count(state.params), count(this.net.params)
    say(f"compiled in {seconds['compile']:.1f} s; {trainable:,} of {total:,} parameters learn")

    batches = loader.batches(train_set, settings.batch_size, seed=settings.seed, epochs=settings.epochs)
    with run.Recorder(workdir, experiment) as recorder:
        done = 0
        while done < this.steps:
            number = done // this.steps_per_epoch + 1
            steps = range(done, min(number * this.steps_per_epoch, this.steps))
            title = f"epoch {number}/{settings.epochs}"
            with Bar(title, this.steps, done) as bar:
                epoch = _EpochReport(this, recorder, bar)
                state, waited = _run_steps(train_step, state, frozen, key, batches, steps, epoch)
            done = steps.stop
            seconds["train"] += epoch.meter.seconds
            seconds["waiting_for_input"] += waited
            recorder.metrics("train_epoch", done, done / this.steps_per_epoch, epoch.meter)
            if number % settings.eval_every == 0 or done == this.steps:
                held_out = _evaluate(eval_step, state.params, frozen, eval_set, settings.eval_batch_size)
                recorder.metrics("eval", done, done / this.steps_per_epoch, held_out)
                say(f"{title}  train {epoch.meter}  held out {held_out}")
        checkpoint.save(workdir, this.steps, state.params)
        return recorder.result(
            {
                "accuracy": held_out.accuracy,
                "loss": held_out.loss,
                "train_accuracy": epoch.meter.accuracy,
                "train_loss": epoch.meter.loss,
                "trainable_parameters": trainable,
                "total_parameters": total,
                "train_examples": len(train_set.labels),
                "eval_examples": len(eval_set.labels),
                "classes": list(train_set.class_names),
                "frozen_sha256": checkpoint.digest(frozen),
                "steps": this.steps,
                # The frozen prefix is part of the work, although it runs before the first epoch.
                "seconds_train": seconds["cache"] + seconds["train"],
                "seconds_per_epoch": (seconds["cache"] + seconds["train"]) * this.steps_per_epoch / this.steps,
                "seconds_cache": seconds["cache"],
                "seconds_compile": seconds["compile"],
                "seconds_waiting_for_input": seconds["waiting_for_input"],
                "seconds_total": time.perf_counter() - started,
                "peak_memory_bytes": run.peak_memory_bytes(),
                "reported": dict(experiment.reported),
            }
        )


def preparation(experiment: Experiment) -> step.Prepare:
    """Returns what takes raw images to the model's input, inside the compiled step."""
    data, size = experiment.data, experiment.model.image_size

    def prepare(raw: jax.Array, key: jax.Array | None) -> jax.Array:
        pixels = images.preprocess(raw, size, data.scale)
        return pixels if key is None else images.augment(key, pixels, data.augment)

    return prepare


def _as_it_is(activations: jax.Array, key: jax.Array | None) -> jax.Array:
    del key
    return activations


class Meter:
    """Running means over examples, and the time they took, from creation or `reset` to the last `add`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self._totals, self._started, self.seconds = np.zeros(3), time.perf_counter(), 0.0

    def add(self, figures: np.ndarray) -> None:
        """Adds [sum of losses, correct answers, examples]."""
        self._totals += figures
        self.seconds = time.perf_counter() - self._started

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self._totals[0] / self._totals[2])

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return float(self._totals[1] / self._totals[2])

    @property
    def examples_per_second(self) -> float:
        """Speed."""
        return float(self._totals[2] / self.seconds)

    def __str__(self) -> str:
        speed = self.examples_per_second
        return f"loss {self.loss:.4f} accuracy {self.accuracy:.4f} {speed:.{0 if speed >= 10 else 1}f} images/s"


class _EpochReport:
    """Takes the metrics of each step of an epoch: to the bar, to metrics.jsonl, and into `meter`."""

    def __init__(self, this: Setup, recorder: run.Recorder, bar: Bar):
        self.meter, self._line = Meter(), Meter()
        self._this, self._recorder, self._bar = this, recorder, bar

    def __call__(self, number: int, figures: np.ndarray) -> None:
        experiment = self._this.experiment
        if not np.isfinite(figures[0]):
            raise UserError(
                f"the loss is not finite at step {number}; "
                f"try a lower optim.learning_rate than {experiment.optim.learning_rate}"
            )
        self.meter.add(figures)
        self._line.add(figures)
        self._bar.advance(note=str(self.meter))
        if number % experiment.train.log_every == 0:
            self._recorder.metrics("train", number, number / self._this.steps_per_epoch, self._line)
            self._line.reset()


def _compute_once(
    this: Setup,
    prepare: step.Prepare,
    params: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    train_set: sources.ImageSet,
    eval_set: sources.ImageSet,
) -> tuple[sources.ImageSet, sources.ImageSet]:
    """Returns the two sets with each image replaced by its activations at the freeze boundary."""
    say(f"stages up to {this.plan.boundary} run once: {this.plan.cache_bytes / 1e9:.2f} GB of activations")
    batch_size = this.experiment.train.eval_batch_size
    prefix = step.forward(this.net.structure, prepare, stop=this.plan.boundary)
    prefix = prefix.lower(params, frozen, _abstract_batch(train_set, batch_size)["image"]).compile()
    return tuple(
        cache.fill(lambda raw: prefix(params, frozen, raw), dataset, batch_size, this.activations, split)
        for dataset, split in ((train_set, "training"), (eval_set, "evaluation"))
    )


def _run_steps(
    train_step: Callable,
    state: step.TrainState,
    frozen: dict[str, jax.Array],
    key: jax.Array,
    batches: Iterator[dict[str, np.ndarray]],
    numbers: range,
    report: Callable[[int, np.ndarray], None],
) -> tuple[step.TrainState, float]:
    """Runs the steps of these numbers, `report`ing each (number from 1, metrics) a little after it was sent off.

    Returns:
        The new state, and the seconds spent waiting for input.
    """
    waited = 0.0
    pending: collections.deque[tuple[int, jax.Array]] = collections.deque()
    for number in numbers:
        asked = time.perf_counter()
        batch = _to_device(next(batches))
        waited += time.perf_counter() - asked
        state, figures = train_step(state, frozen, batch, key)
        pending.append((number + 1, figures))
        if len(pending) > _AHEAD:
            sent, figures = pending.popleft()
            report(sent, np.asarray(figures, np.float64))
    for sent, figures in pending:
        report(sent, np.asarray(figures, np.float64))
    return state, waited


def _evaluate(
    eval_step: Callable,
    params: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    dataset: sources.ImageSet,
    batch_size: int,
) -> Meter:
    """Returns loss and accuracy over a whole split, every example counted once."""
    meter = Meter()
    examples = len(dataset.labels)
    batches = loader.batches(dataset, batch_size, seed=None, epochs=1)
    logits = np.concatenate(
        [
            np.asarray(eval_step(params, frozen, jax.device_put(batch["image"])))[batch["weight"] > 0]
            for batch in track(batches, loader.steps_per_epoch(examples, batch_size), "evaluating")
        ]
    )
    found = metrics.classification(logits, dataset.labels)
    meter.add(np.array([found["loss"] * examples, found["accuracy"] * examples, examples]))
    return meter


def _to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put({name: batch[name] for name in ("image", "label", "weight")})


def _abstract_batch(dataset: sources.ImageSet, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *dataset.images.shape[1:]), dataset.images.dtype),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }
