"""One run from start to end: data, network, compiled steps, epochs, evaluation, result."""

import collections
import dataclasses
import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from jaxtl import hosts, interrupt, remote
from jaxtl.config import Experiment, Images
from jaxtl.data import loader, sources
from jaxtl.data.listing import Examples, Listing, Ragged
from jaxtl.errors import UserError
from jaxtl.evaluation import predictions
from jaxtl.models import stages
from jaxtl.progress import Bar, say, track
from jaxtl.training import account, cache, checkpoint, freeze, optim, run, sharding, step
from jaxtl.training.compiled import behind, compile_step
from jaxtl.training.evaluate import Evaluation, evaluator, preparation
from jaxtl.training.network import TOKENIZER, initial_params, locate
from jaxtl.training.setup import Setup, count, look
from jaxtl.training.standing import Kept, Standing

# Steps sent to the device ahead of the one whose metrics are read: enough to keep it busy.
_AHEAD = 2
# With train.on_nonfinite=skip: so many steps skipped in a row, and no step will ever do.
_HOPELESS = 50


def train(experiment: Experiment, workdir: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Trains and evaluates as the experiment says, writes the run folder, and returns what result.json holds.

    A run there that was interrupted goes on from its last checkpoint, to the same result, bit for bit; of a finished
    one the result is returned. In a new folder nothing is written before data, weights and rules have been found in
    order and the steps are compiled.

    Args:
        experiment: what to do.
        workdir: the run folder.
        overwrite: move aside what is in the folder, and start anew.

    Raises:
        UserError: something the user can mend.
        Interrupted: a signal came; what was done is saved.
    """
    started = time.perf_counter()
    remote.share(workdir)
    run.forget_peak_memory()  # of the runs before this one, in a suite
    with run.Claim(workdir) as claim:
        if done := run.finished(workdir, experiment, overwrite):
            return done
        saved = checkpoint.load(workdir) if claim.taken and not overwrite else None
        ready = _prepare(experiment, saved)
        standing, state, history = Standing(), ready.state, None
        if saved:
            try:
                standing = Standing.from_json(saved.record["standing"], saved.kept or saved.params)
                history = saved.record["history"]
                ready.batches.set_state(saved.record["batches"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UserError(
                    f"the checkpoint of step {saved.step} in {workdir} is of another version of jaxtl or grain: go on "
                    "with the versions in its environment.json, or --overwrite to start anew"
                ) from None
            state = ready.this.layout.put(saved.state(state))
            say(f"going on after step {saved.step} of {ready.this.steps}")
        standing.seconds.update(ready.seconds)
        hosts.together("all is read")  # before the first process writes anything
        claim.take(anew=overwrite)
        with (
            interrupt.deferred(),
            run.Recorder(workdir, experiment, history) as recorder,
            checkpoint.Saver(workdir, experiment.checkpoint, saved and saved.step) as saver,
        ):
            if ready.this.tokenizer is not None and hosts.first():
                ready.this.tokenizer.save_pretrained(str(workdir / TOKENIZER))
            if experiment.checkpoint.save_frozen:
                frozen = {path: ready.this.layout.read(value) for path, value in ready.frozen.items()}
                if hosts.first():
                    checkpoint.write(workdir / checkpoint.FROZEN, frozen)
            going = _Loop(ready, recorder, saver, standing, state, started)
            try:
                going.run()
                return going.finish(workdir)
            except interrupt.Interrupted:
                going.save()
                saver.wait()
                raise


@dataclasses.dataclass(frozen=True)
class _Ready:
    """All that training needs, with nothing trained yet.

    Attributes:
        state: before the first step.
        frozen: the other parameters.
        key: of the whole run, for dropout and augmentation.
        splits: for training, held out, and for the test where there is one; inputs or activations.
        drawn: the same splits, before their inputs were decoded or made into activations.
        train_step, evaluate: compiled.
        batches: of the whole run.
        image_shape: height and width that the images were decoded to; None of texts.
        origins: digests of what is not saved with a checkpoint and must still be the same when the run goes on.
        cache: where the activations came from, and the space they take.
        seconds: that it took, of `cache` and `compile`.
    """

    this: Setup
    state: step.TrainState
    frozen: stages.Params
    key: jax.Array
    splits: list[Examples]
    drawn: list[Listing] | list[Examples]
    train_step: Callable
    evaluate: Callable[[stages.Params, Examples], Evaluation]
    batches: grain.DatasetIterator
    image_shape: tuple[int, int] | None
    origins: dict[str, str]
    cache: tuple[str | None, int]
    seconds: dict[str, float]


def _prepare(experiment: Experiment, saved: checkpoint.Saved | None) -> _Ready:
    settings = experiment.train
    layout = sharding.layout(experiment)
    this, drawn = look(experiment, locate, track)
    this = dataclasses.replace(this, layout=layout)
    params = layout.put(initial_params(this.net, experiment.model, this.weights, settings.seed))
    params, frozen = freeze.partition(params, this.labels)
    splits, image_shape = drawn, None
    if isinstance(experiment.data, Images):  # after all that can be wrong with the rest: decoding may take minutes
        owners = None
        if layout.processes > 1:
            sizes = [len(listing.labels) for listing in drawn]
            owners = [loader.owners(None, size, settings.eval_batch_size, layout.processes) for size in sizes]
        splits = sources.read(drawn, experiment.data.resize, experiment.model.image_size, track, owners=owners)
        image_shape = splits[0].inputs.shape[1:3]
    origins = {"frozen": checkpoint.digest(frozen, layout.read), "examples": _digest(splits)}
    if saved:
        _check_origins(saved, origins, experiment)
    seconds = collections.Counter()

    prepare, start, once = preparation(this), None, None
    began = saved and saved.record["origins"].get("cached")
    if this.plan.cached and began == str(False):  # there was no room: other activations would be rounded otherwise
        say("the frozen stages run in every step, as they did when the run in this folder began")
    elif this.plan.cached:
        begun = time.perf_counter()
        once = cache.run_prefix(this, prepare, params, frozen, splits)
        seconds["cache"] += time.perf_counter() - begun
    origins["cached"] = str(once is not None)
    if saved and began != origins["cached"]:
        raise UserError(
            "the run in this folder began with kept activations of the frozen stages, for which there is no room now, "
            "and without them results are rounded otherwise: put plan.cache_budget_gb, plan.cache_disk_gb, room on the "
            "disk and the number of processes back to what they were, or --overwrite to start anew"
        )
    if once:
        seconds["cache"] -= once.seconds_compile
        seconds["compile"] += once.seconds_compile
        splits, prepare, start = once.splits, once.prepare, this.start

    if layout.mesh:
        state = jax.jit(lambda params: layout.divided(step.TrainState.create(params, this.optimizer)))(params)
    else:
        state = step.TrainState.create(params, this.optimizer)
    # The key itself made the initial values.
    key = layout.put_key(jax.random.fold_in(jax.random.key(settings.seed), 1))
    begun = time.perf_counter()
    train_step = compile_step(
        this.train_step(prepare, start), (state, frozen), splits[0], settings.batch_size, this, (key,)
    )
    evaluate = evaluator(this, prepare, start, state.params, frozen, splits[1])
    seconds["compile"] += time.perf_counter() - begun
    trainable, total = count(state.params), count(this.net.params)
    say(f"compiled in {seconds['compile']:.1f} s; {trainable:,} of {total:,} parameters learn")
    return _Ready(
        this,
        state,
        frozen,
        key,
        splits,
        drawn,
        train_step,
        evaluate,
        loader.batches(
            splits[0],
            settings.batch_size,
            seed=settings.seed,
            epochs=settings.epochs,
            lengths=this.lengths,
            shard=layout.shard,
        ),
        image_shape,
        origins,
        (once.origin, once.bytes) if once else ("off" if this.plan.boundary else None, 0),
        seconds,
    )


def _each(seconds: collections.Counter) -> dict[str, list[float]]:
    """Returns the times of several processes, for result.json."""
    if hosts.count() == 1:
        return {}
    train, waiting = hosts.gather([seconds["train"], seconds["waiting_for_input"]])
    return {"seconds_train_by_process": train, "seconds_waiting_for_input_by_process": waiting}


def _by_process(seconds: collections.Counter) -> str:
    """Returns what the slowest and the fastest of several processes took, and which one it was."""
    shown = []
    for name, figures in zip(
        ("training", "waiting for input"), hosts.gather([seconds["train"], seconds["waiting_for_input"]]), strict=True
    ):
        longest = max(figures)
        shown.append(f"{name} {min(figures):.1f} to {longest:.1f} s (process {figures.index(longest)})")
    return ", ".join(shown)


def _digest(splits: list[Examples]) -> str:
    """Returns a SHA-256 over which examples there are, in which order, and what class and length each has."""
    sha256 = hashlib.sha256()
    for examples in splits:
        lengths = examples.inputs.lengths if isinstance(examples.inputs, Ragged) else None
        sha256.update(json.dumps([examples.class_names, examples.ids]).encode())
        sha256.update(examples.labels.tobytes() + (b"" if lengths is None else lengths.tobytes()))
    return sha256.hexdigest()


def _check_origins(saved: checkpoint.Saved, origins: dict[str, str], experiment: Experiment) -> None:
    """Raises UserError where weights or data have changed; says where only versions or the machine have."""
    changed = [name for name, digest in origins.items() if saved.record.get("origins", {}).get(name) != digest]
    what = {
        "frozen": f"the weights that model.weights={experiment.model.weights} names",
        "examples": "the data",
    }
    if changed:
        raise UserError(
            f"{' and '.join(what[name] for name in changed)} have changed since the run in this folder began: put back "
            f"what was there at its step {saved.step}, or --overwrite to start anew"
        )
    then, now = saved.record.get("environment", {}), run.environment()
    if differing := [name for name in now if then.get(name) != now[name]]:
        say(f"{', '.join(differing)} changed since the checkpoint: results may differ in their last bits")


class _Loop:
    """A run under way."""

    def __init__(
        self,
        ready: _Ready,
        recorder: run.Recorder,
        saver: checkpoint.Saver,
        standing: Standing,
        state: step.TrainState,
        started: float,
    ):
        self._ready, self._this = ready, ready.this
        self._experiment = ready.this.experiment
        self._recorder, self._saver = recorder, saver
        self._standing, self._state = standing, state
        self._agreed = 0  # what the processes ask of each other, see `Layout.put_batch`
        # As though the processes that were interrupted had been this one.
        self._started = started - standing.seconds["before"]

    def run(self) -> None:
        """Trains what is left, and saves the state after the last step."""
        this, standing, settings = self._this, self._standing, self._experiment.train
        if self._experiment.model.head.kind == "mlm" and standing.before is None:
            before = self._evaluate(self._state.params)
            standing.before = before.metrics
            self._recorder.metrics("eval", 0, 0.0, before.figures)
            say(f"before training  held out {before}")
        last = -(-this.steps // this.steps_per_epoch)
        while standing.epoch <= last:
            title = f"epoch {standing.epoch}/{settings.epochs}"
            before = standing.seconds.copy()
            with Bar(title, this.steps, standing.step) as bar:
                self._run_steps(min(standing.epoch * this.steps_per_epoch, this.steps), bar)
            if this.layout.processes > 1:
                say(f"{title}  {_by_process(standing.seconds - before)}")
            held_out = None
            if standing.epoch % settings.eval_every == 0 or standing.epoch == last:
                held_out = self._evaluate(self._state.params)
            # Written when nothing of the epoch is left that could be interrupted, and done again.
            self._record("train_epoch", standing.meter.figures)
            if held_out:
                self._record("eval", held_out.figures)
                say(f"{title}  train {standing.meter}  held out {held_out}")
                best = standing.kept is None or held_out.better_than(standing.kept.evaluation)
                if best if settings.select == "best" else standing.epoch == last:
                    # Copied: the next step takes the state's own buffers.
                    params = this.layout.host(self._state.params)
                    standing.kept = Kept(standing.step, held_out, params)
            standing.close_epoch(last=standing.epoch == last)
            if standing.epoch > last or self._saver.due(standing.step) or self._overdue(standing.step):
                self.save()

    def save(self) -> None:
        """Begins to save the state as it is, unless it is that before the first step."""
        standing, kept = self._standing, self._standing.kept
        if not standing.step:
            return
        self._saver.wait()  # until it has done with its copy of the state before there is another
        standing.seconds["before"] = time.perf_counter() - self._started
        self._saver.save(
            self._this.layout.host(self._state),  # copied: the next step takes the state's own buffers
            kept.params if kept and kept.step != standing.step else None,
            {
                "standing": standing.to_json(),
                "batches": self._ready.batches.get_state(),
                "history": self._recorder.history,
                "origins": self._ready.origins,
                "environment": run.environment(),
            },
        )

    def finish(self, workdir: Path) -> dict[str, Any]:
        """Judges what was kept, writes it, and returns what result.json holds."""
        this, standing, ready = self._this, self._standing, self._ready
        train_set, eval_set, *test_sets = ready.splits
        kept, params = standing.kept, this.layout.put(standing.kept.params)
        judged, examples = kept.evaluation, eval_set
        if test_sets:  # looked at once, with the parameters that were kept
            judged, examples = self._evaluate(params, test_sets[0]), test_sets[0]
            say(f"test {judged}")
        elif self._experiment.model.head.kind != "mlm" and judged.logits is None:  # of a process that was interrupted
            judged = self._evaluate(params)
        self._saver.wait()
        if self._saver.latest != this.steps:
            raise UserError(
                f"{workdir} cannot hold the last checkpoint, see above: make room there and give the same command again"
            )
        if hosts.first():
            checkpoint.write(workdir / checkpoint.TRAINED, kept.params)
        if judged.logits is not None and hosts.first():
            found = predictions.Predictions(examples.ids, examples.labels, judged.logits)
            predictions.write(workdir / predictions.ARRAYS, found)
            (workdir / run.REPORT).mkdir(exist_ok=True)
            predictions.write_table(workdir / run.REPORT / predictions.TABLE, examples, judged.logits)
        seconds = standing.seconds
        worked = seconds["cache"] + seconds["train"]
        result = {
            "accuracy": kept.evaluation.metrics["accuracy"],
            "loss": kept.evaluation.metrics["loss"],
            "held_out": kept.evaluation.metrics,
            "test": judged.metrics if test_sets else None,
            "before": standing.before,
            "selected_step": kept.step,
            "selected_epoch": kept.step / this.steps_per_epoch,
            "train_accuracy": standing.meter.accuracy,
            "train_loss": standing.meter.loss,
            "skipped_steps": standing.skipped,
            "trainable_parameters": count(self._state.params),
            "total_parameters": count(this.net.params),
            "train_examples": len(train_set.labels),
            "eval_examples": len(eval_set.labels),
            "test_examples": len(test_sets[0].labels) if test_sets else 0,
            "classes": list(train_set.class_names),
            "image_shape": ready.image_shape and list(ready.image_shape),  # as it is read again
            "architecture": dataclasses.asdict(this.net.config),
            "frozen_sha256": ready.origins["frozen"],
            "trained_sha256": checkpoint.digest(kept.params),
            "steps": this.steps,
            # The frozen prefix is part of the work, although it runs before the first epoch.
            "seconds_train": worked,
            "seconds_per_epoch": worked * this.steps_per_epoch / this.steps,
            "seconds_cache": seconds["cache"],
            "cache": ready.cache[0],
            "cache_bytes": ready.cache[1],
            "seconds_compile": seconds["compile"],
            "seconds_evaluate": seconds["evaluate"],
            "seconds_waiting_for_input": seconds["waiting_for_input"],
            "seconds_total": time.perf_counter() - self._started,
            **_each(seconds),
            "peak_memory_bytes": run.peak_memory_bytes(),
            "reported": dict(self._experiment.reported),
            **run.environment(),
        }
        if hosts.first():
            figures = account.write(workdir, this, ready.drawn, judged.logits, result, self._recorder.history)
            self._recorder.figures(figures, this.steps)
        result = self._recorder.result(result)
        hosts.together("finished")
        return result

    def _evaluate(self, params: stages.Params, examples: Examples | None = None) -> Evaluation:
        found = self._ready.evaluate(params, self._ready.splits[1] if examples is None else examples)
        self._standing.seconds["evaluate"] += found.seconds
        return found

    def _record(self, split: str, figures: dict[str, Any]) -> None:
        done = self._standing.step
        self._recorder.metrics(split, done, done / self._this.steps_per_epoch, figures)

    def _run_steps(self, until: int, bar: Bar) -> None:
        """Trains up to the step of this number, saving the state on the way when that is due.

        Raises:
            Interrupted: a signal came.
        """
        standing = self._standing
        standing.meter.go_on()
        standing.line.go_on()
        before = standing.meter.seconds
        while standing.step < until:
            self._agreed = 0
            for done, figures, rows in behind(self._sent(until), _AHEAD):
                self._report(done, np.asarray(figures, np.float64), rows, bar)
            standing.seconds["train"] += standing.meter.seconds - before
            before = standing.meter.seconds
            self._stop_if_asked()
            if standing.step < until:
                self.save()
                standing.meter.go_on()
                standing.line.go_on()
        self._stop_if_asked()

    @property
    def _asked(self) -> bool:
        """Whether to stop: of several processes, what all of them know after the same step."""
        return interrupt.asked() if self._this.layout.processes == 1 else bool(self._agreed & 1)

    def _overdue(self, step: int) -> bool:
        """Whether a checkpoint is due by the clock."""
        return self._saver.overdue(step) if self._this.layout.processes == 1 else bool(self._agreed & 2)

    def _stop_if_asked(self) -> None:
        if self._asked:
            interrupt.note(signal.SIGTERM)  # it may have come to another process
            interrupt.check()

    def _sent(self, until: int) -> Iterator[tuple[int, jax.Array, np.ndarray]]:
        """Sends steps to the device until one of that number, or until there is something else to do."""
        ready, done = self._ready, self._standing.step
        while done < until:
            asked = time.perf_counter()
            host = next(ready.batches)
            batch = self._this.layout.put_batch(host, interrupt.asked() + 2 * self._saver.overdue(done + 1))
            self._standing.seconds["waiting_for_input"] += time.perf_counter() - asked
            self._state, figures = ready.train_step(self._state, ready.frozen, batch, ready.key)
            done += 1
            yield done, figures, host["rows"]
            if self._asked or self._saver.due(done) or self._overdue(done):
                return

    def _report(self, done: int, figures: np.ndarray, rows: np.ndarray, bar: Bar) -> None:
        """Takes in the figures of a step that is done: to the bar, to metrics.jsonl, and into the means."""
        standing = self._standing
        standing.step = done
        self._agreed |= int(figures[5])
        if figures[4]:
            self._not_finite(figures[0] / max(figures[2], 1), rows)
        else:
            standing.skipped_in_a_row = 0
            standing.meter.add(figures[:4])
            standing.line.add(figures[:4])
        bar.advance(note=str(standing.meter))
        if done % self._experiment.train.log_every == 0:
            self._record("train", standing.line.figures)
            standing.line.reset()

    def _not_finite(self, loss: float, rows: np.ndarray) -> None:
        """Stops the run, or goes on without the step's update, which the step has left out by itself."""
        standing, experiment = self._standing, self._experiment
        # Steps that were skipped do not count for the schedule.
        schedule = optim.schedule(experiment.optim, self._this.steps, getattr(self._this.net.config, "width", None))
        rate = float(schedule(standing.step - 1 - standing.skipped))
        ids = [self._ready.splits[0].ids[row] for row in rows if row >= 0]
        self._record("not_finite", {"loss": str(loss), "learning_rate": rate, "examples": ids})
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more, see {run.METRICS}" if len(ids) > 8 else "")
        where = (
            f"the loss or a gradient is not finite at step {standing.step} (learning rate {rate:g}; examples {shown})"
        )
        standing.skipped += 1
        standing.skipped_in_a_row += 1
        if experiment.train.on_nonfinite == "skip" and standing.skipped_in_a_row < _HOPELESS:
            say(f"{where}: skipped, {standing.skipped} so far")
            return
        self._saver.wait()
        kept = (
            f"the checkpoint of step {self._saver.latest} is kept" if self._saver.latest else "there is no checkpoint"
        )
        hints = [f"a lower optim.learning_rate than {experiment.optim.learning_rate:g}", "optim.clip_norm"]
        if experiment.train.on_nonfinite == "stop":
            hints.append("train.on_nonfinite=skip")
        raise UserError(f"{where}; {kept}; try {' or '.join(hints)}, with --overwrite or another --workdir")
