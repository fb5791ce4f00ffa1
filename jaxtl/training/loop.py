"""One run from start to end: data, network, compiled steps, epochs, evaluation, result."""

import collections
import math
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
from jaxtl.training import checkpoint, freeze, optim, run, step
from jaxtl.training.network import initial_params, locate, network

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
    weights = locate(experiment.model.weights)
    train_set, eval_set = sources.load(experiment.data, experiment.model.image_size, track)
    net = network(experiment.model, len(train_set.class_names), settings.precision, weights)
    labels = freeze.label_params(net.params, experiment.freeze, net.stages)
    steps_per_epoch = loader.steps_per_epoch(len(train_set.labels), settings.batch_size)
    total_steps = min(steps_per_epoch * settings.epochs, settings.max_steps or math.inf)
    trained_labels, _ = freeze.partition(labels, labels)
    optimizer = optim.optimizer(experiment.optim, trained_labels, total_steps)
    params, frozen = freeze.partition(initial_params(net, experiment.model, weights, settings.seed), labels)
    state = step.TrainState.create(params, optimizer)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)  # the key itself made the initial values
    batches = loader.batches(train_set, settings.batch_size, seed=settings.seed, epochs=settings.epochs)

    compile_started = time.perf_counter()
    prepare = preparation(experiment)
    train_step = step.train_step(net.structure, optimizer, prepare, freeze.frozen_stages(labels, net.stages))
    train_step = train_step.lower(state, frozen, _abstract_batch(train_set, settings.batch_size), key).compile()
    eval_images = _abstract_batch(eval_set, settings.eval_batch_size)["image"]
    eval_step = step.eval_step(net.structure, prepare).lower(state.params, frozen, eval_images).compile()
    seconds_compile = time.perf_counter() - compile_started
    say(f"compiled in {seconds_compile:.1f} s; {count(state.params):,} of {count(net.params):,} parameters learn")

    with run.Recorder(workdir, experiment) as recorder:
        done, seconds_train, seconds_waiting = 0, 0.0, 0.0
        while done < total_steps:
            steps = min(steps_per_epoch - done % steps_per_epoch, total_steps - done)
            title = f"epoch {done // steps_per_epoch + 1}/{settings.epochs}"
            line, epoch = Meter(), Meter()
            with Bar(title, steps) as bar:

                def report(number: int, figures: np.ndarray, line: Meter = line, epoch: Meter = epoch, bar: Bar = bar):
                    if not np.isfinite(figures[0]):
                        raise UserError(
                            f"the loss is not finite at step {number}; "
                            f"try a lower optim.learning_rate than {experiment.optim.learning_rate}"
                        )
                    line.add(figures)
                    epoch.add(figures)
                    bar.advance(note=str(epoch))
                    if number % settings.log_every == 0:
                        recorder.metrics("train", number, number / steps_per_epoch, line)
                        line.reset()

                state, waited = _run_steps(train_step, state, frozen, key, batches, range(done, done + steps), report)
            done += steps
            seconds_train += epoch.seconds
            seconds_waiting += waited
            recorder.metrics("train_epoch", done, done / steps_per_epoch, epoch)
            held_out = _evaluate(eval_step, state.params, frozen, eval_set, settings.eval_batch_size)
            recorder.metrics("eval", done, done / steps_per_epoch, held_out)
            say(f"{title}  train {epoch}  held out {held_out}")
        checkpoint.save(workdir, total_steps, state.params)
        return recorder.result(
            {
                "accuracy": held_out.accuracy,
                "loss": held_out.loss,
                "train_accuracy": epoch.accuracy,
                "train_loss": epoch.loss,
                "trainable_parameters": count(state.params),
                "total_parameters": count(net.params),
                "train_examples": len(train_set.labels),
                "eval_examples": len(eval_set.labels),
                "classes": list(train_set.class_names),
                "steps": total_steps,
                "seconds_train": seconds_train,
                "seconds_per_epoch": seconds_train * steps_per_epoch / total_steps,
                "seconds_compile": seconds_compile,
                "seconds_waiting_for_input": seconds_waiting,
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


def count(params: dict[str, Any]) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in params.values())


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
        return f"loss {self.loss:.4f} accuracy {self.accuracy:.4f} {self.examples_per_second:.1f} images/s"


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
    logits = np.concatenate(
        [
            np.asarray(eval_step(params, frozen, jax.device_put(batch["image"])))[batch["weight"] > 0]
            for batch in track(
                loader.batches(dataset, batch_size, seed=None, epochs=1),
                "evaluating",
                loader.steps_per_epoch(len(dataset.labels), batch_size),
            )
        ]
    )
    found = metrics.classification(logits, dataset.labels)
    examples = len(dataset.labels)
    meter.add(np.array([found["loss"] * examples, found["accuracy"] * examples, examples]))
    return meter


def _to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put({name: batch[name] for name in ("image", "label", "weight")})


def _abstract_batch(dataset: sources.ImageSet, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *dataset.images.shape[1:]), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }
