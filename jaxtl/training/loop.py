"""One run from start to end: data, network, compiled steps, epochs, evaluation, result."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtl.config import Experiment, Images
from jaxtl.data import loader, sources
from jaxtl.errors import UserError
from jaxtl.evaluation import misclassified
from jaxtl.models import stages
from jaxtl.progress import Bar, say, track
from jaxtl.training import cache, checkpoint, freeze, run, step
from jaxtl.training.compiled import behind, compile_step
from jaxtl.training.evaluate import Evaluation, evaluator, preparation
from jaxtl.training.network import TOKENIZER, initial_params, locate
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
    params = initial_params(this.net, experiment.model, this.weights, settings.seed)
    params, frozen = freeze.partition(params, this.labels)
    splits = drawn
    if isinstance(experiment.data, Images):  # after all that can be wrong with the rest: decoding may take minutes
        splits = sources.read(drawn, experiment.data.resize, experiment.model.image_size, track)
    seconds = collections.Counter()

    prepare, start, once = preparation(this), None, None
    if this.plan.cached:
        begun = time.perf_counter()
        once = cache.run_prefix(this, prepare, params, frozen, splits)
        seconds["cache"] += time.perf_counter() - begun
    if once:
        seconds["cache"] -= once.seconds_compile
        seconds["compile"] += once.seconds_compile
        splits, prepare, start = once.splits, once.prepare, this.start
    train_set, eval_set, *test_sets = splits

    state = step.TrainState.create(params, this.optimizer)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)  # the key itself made the initial values
    begun = time.perf_counter()
    train_step = compile_step(
        this.train_step(prepare, start),
        (state, frozen),
        train_set,
        settings.batch_size,
        this.lengths,
        (key,),
    )
    evaluate = evaluator(this, prepare, start, state.params, frozen, eval_set)
    seconds["compile"] += time.perf_counter() - begun
    trainable, total = count(state.params), count(this.net.params)
    say(f"compiled in {seconds['compile']:.1f} s; {trainable:,} of {total:,} parameters learn")

    batches = loader.batches(
        train_set, settings.batch_size, seed=settings.seed, epochs=settings.epochs, lengths=this.lengths
    )
    with run.Recorder(workdir, experiment) as recorder:
        if this.tokenizer is not None:
            this.tokenizer.save_pretrained(str(workdir / TOKENIZER))
        before, kept, done = None, None, 0
        if experiment.model.head.kind == "mlm":
            before = evaluate(state.params, eval_set)
            recorder.metrics("eval", 0, 0.0, before.figures)
            say(f"before training  held out {before}")
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
            recorder.metrics("train_epoch", done, done / this.steps_per_epoch, epoch.meter.figures)
            if number % settings.eval_every == 0 or done == this.steps:
                held_out = evaluate(state.params, eval_set)
                seconds["evaluate"] += held_out.seconds
                recorder.metrics("eval", done, done / this.steps_per_epoch, held_out.figures)
                say(f"{title}  train {epoch.meter}  held out {held_out}")
                if settings.select == "last" or kept is None or held_out.better_than(kept.evaluation):
                    # Copied: the next step takes the state's own buffers.
                    kept = _Kept(done, held_out, jax.tree.map(np.array, state.params))
        # The test is looked at once, with the parameters that were kept.
        judged, examples = kept.evaluation, eval_set
        if test_sets:
            judged, examples = evaluate(jax.device_put(kept.params), test_sets[0]), test_sets[0]
            seconds["evaluate"] += judged.seconds
            say(f"test {judged}")
        checkpoint.save(workdir, kept.step, kept.params)
        if judged.logits is not None:
            misclassified.write(workdir / misclassified.FILE, examples, judged.logits)
        return recorder.result(
            {
                "accuracy": kept.evaluation.metrics["accuracy"],
                "loss": kept.evaluation.metrics["loss"],
                "held_out": kept.evaluation.metrics,
                "test": judged.metrics if test_sets else None,
                "before": before.metrics if before else None,
                "selected_step": kept.step,
                "selected_epoch": kept.step / this.steps_per_epoch,
                "train_accuracy": epoch.meter.accuracy,
                "train_loss": epoch.meter.loss,
                "trainable_parameters": trainable,
                "total_parameters": total,
                "train_examples": len(train_set.labels),
                "eval_examples": len(eval_set.labels),
                "test_examples": len(test_sets[0].labels) if test_sets else 0,
                "classes": list(train_set.class_names),
                "architecture": dataclasses.asdict(this.net.config),
                "frozen_sha256": checkpoint.digest(frozen),
                "steps": this.steps,
                # The frozen prefix is part of the work, although it runs before the first epoch.
                "seconds_train": seconds["cache"] + seconds["train"],
                "seconds_per_epoch": (seconds["cache"] + seconds["train"]) * this.steps_per_epoch / this.steps,
                "seconds_cache": seconds["cache"],
                "cache": once.origin if once else "off" if this.plan.boundary else None,
                "cache_bytes": once.bytes if once else 0,
                "seconds_compile": seconds["compile"],
                "seconds_evaluate": seconds["evaluate"],
                "seconds_waiting_for_input": seconds["waiting_for_input"],
                "seconds_total": time.perf_counter() - started,
                "peak_memory_bytes": run.peak_memory_bytes(),
                "reported": dict(experiment.reported),
            }
        )


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Parameters that may become the run's result."""

    step: int
    evaluation: Evaluation
    params: stages.Params


class Meter:
    """Running means over answers, and the time they took, from creation or `reset` to the last `add`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self._totals, self._started, self.seconds = np.zeros(4), time.perf_counter(), 0.0

    def add(self, figures: np.ndarray) -> None:
        """Adds [sum of losses, correct answers, answers, examples]."""
        self._totals += figures
        self.seconds = time.perf_counter() - self._started

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self._totals[0] / max(self._totals[2], 1))

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return float(self._totals[1] / max(self._totals[2], 1))

    @property
    def figures(self) -> dict[str, float]:
        """Loss, accuracy and speed, for metrics.jsonl."""
        speed = round(self._totals[3] / self.seconds, 2)
        return {"loss": self.loss, "accuracy": self.accuracy, "examples_per_second": speed}

    def __str__(self) -> str:
        speed = self._totals[3] / self.seconds
        return f"loss {self.loss:.4f} accuracy {self.accuracy:.4f} {speed:.{0 if speed >= 10 else 1}f} examples/s"


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
            self._recorder.metrics("train", number, number / self._this.steps_per_epoch, self._line.figures)
            self._line.reset()


def _run_steps(
    train_step: Callable,
    state: step.TrainState,
    frozen: stages.Params,
    key: jax.Array,
    batches: Iterator[dict[str, Any]],
    numbers: range,
    report: Callable[[int, np.ndarray], None],
) -> tuple[step.TrainState, float]:
    """Runs the steps of these numbers, `report`ing each (number from 1, figures) a little after it was sent off.

    Returns:
        The new state, and the seconds spent waiting for input.
    """
    waited = 0.0

    def sent() -> Iterator[tuple[int, jax.Array]]:
        nonlocal state, waited
        for number in numbers:
            asked = time.perf_counter()
            batch = jax.device_put(next(batches))
            waited += time.perf_counter() - asked
            state, figures = train_step(state, frozen, batch, key)
            yield number + 1, figures

    for number, figures in behind(sent(), _AHEAD):
        report(number, np.asarray(figures, np.float64))
    return state, waited
