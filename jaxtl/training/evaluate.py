"""Evaluation of a model on a whole split, every example counted once."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtl import interrupt
from jaxtl.config import Experiment, Text
from jaxtl.data import images, loader, masking, tokens
from jaxtl.data.listing import Examples
from jaxtl.errors import UserError
from jaxtl.evaluation import metrics
from jaxtl.models import stages
from jaxtl.progress import track
from jaxtl.training import step
from jaxtl.training.compiled import behind, compile_step
from jaxtl.training.setup import Setup

# What evaluation hides of a text depends on the text's number alone, so that runs and epochs can be compared.
_EVALUATION_SEED = 0

_DIVERGED = "the model's answers are not finite: training diverged; lower optim.learning_rate"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        metrics: `jaxtl.evaluation.metrics.classification`; of masked language modelling `accuracy`, `loss` and
            `perplexity`, over the hidden word pieces.
        examples: their number.
        logits: float32 `[examples, classes]` or `[examples, 1]`, in the order of the examples; None of masked language
            modelling.
        seconds: that it took.
    """

    metrics: dict[str, Any]
    logits: np.ndarray | None
    examples: int
    seconds: float

    @property
    def examples_per_second(self) -> float:
        """Speed."""
        return self.examples / self.seconds

    @property
    def figures(self) -> dict[str, Any]:
        """Metrics and speed, for metrics.jsonl."""
        return {**self.metrics, "examples_per_second": round(self.examples_per_second, 2)}

    def better_than(self, other: "Evaluation") -> bool:
        """Whether these parameters are to be preferred: by accuracy, then loss; of masked language modelling, loss."""

        def merit(metrics: dict[str, Any]) -> tuple[float, ...]:
            return (-metrics["loss"],) if "perplexity" in metrics else (metrics["accuracy"], -metrics["loss"])

        return merit(self.metrics) > merit(other.metrics)

    def __str__(self) -> str:
        shown = [
            f"{name} {self.metrics[name]:.4f}" for name in ("loss", "accuracy", "perplexity") if name in self.metrics
        ]
        return " ".join(
            [*shown, f"{self.examples_per_second:.{0 if self.examples_per_second >= 10 else 1}f} examples/s"]
        )


def preparation(this: Setup) -> step.Prepare:
    """Returns what takes a raw batch to the model's input, inside the compiled step."""
    experiment = this.experiment
    data = experiment.data
    if not isinstance(data, Text):
        return image_preparation(experiment)
    if experiment.model.head.kind != "mlm":
        return step.unchanged
    ids = tokens.token_ids(this.tokenizer)

    def hide(batch: step.Batch, key: jax.Array | None) -> step.Batch:
        key = jax.random.key(_EVALUATION_SEED) if key is None else key
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])
        inputs, label, weight = masking.mask(
            batch["input"],
            keys,
            rate=data.mask_rate,
            mask_id=ids.mask,
            special_ids=ids.special,
            vocabulary=ids.vocabulary,
        )
        return {**batch, "input": inputs, "label": label, "weight": weight * batch["weight"][:, None]}

    return hide


def image_preparation(experiment: Experiment) -> step.Prepare:
    """Returns what takes pixels, `[batch, height, width, 3]` uint8, to the model's input."""
    data, size = experiment.data, experiment.model.image_size

    def prepare(batch: step.Batch, key: jax.Array | None) -> step.Batch:
        pixels = images.preprocess(batch["input"], size, data.scale)
        return {**batch, "input": pixels if key is None else images.augment(key, pixels, data.augment)}

    return prepare


def evaluator(
    this: Setup, prepare: step.Prepare, start: str | None, params: stages.Params, frozen: stages.Params, like: Examples
) -> Callable[[stages.Params, Examples], Evaluation]:
    """Returns `evaluate(params, examples)`, compiled.

    Args:
        this: the run.
        prepare, start: see `step.train_step`.
        params: trainable parameters, or abstract ones.
        frozen: the others.
        like: a split, for the shapes of the batches of every one.
    """
    hidden = this.experiment.model.head.kind == "mlm"
    batch_size = this.experiment.train.eval_batch_size
    make = step.score if hidden else step.forward
    compiled = compile_step(
        make(this.net.structure, prepare, start, layout=this.layout), (params, frozen), like, batch_size, this
    )

    def evaluate(params: stages.Params, examples: Examples) -> Evaluation:
        started, count = time.perf_counter(), len(examples.labels)
        batches = loader.batches(examples, batch_size, seed=None, lengths=this.lengths, shard=this.layout.shard)
        figures, logits = np.zeros(4), None
        shown = track(batches, loader.steps_per_epoch(count, batch_size), "evaluating")
        sent = ((batch["rows"], compiled(params, frozen, this.layout.put_batch(batch))) for batch in shown)
        for index, found in behind(sent, 1):
            if this.layout.processes == 1:  # several stop together, between two steps
                interrupt.check()
            found = np.asarray(found)
            if hidden:
                figures += found
                continue
            if logits is None:
                logits = np.empty((count, *found.shape[1:]), found.dtype)
            logits[index[index >= 0]] = found[index >= 0]
        if hidden:
            if not figures[2]:
                raise UserError("nothing of the held-out texts can be hidden: the tokenizer knows no piece of them")
            loss = float(figures[0] / figures[2])
            if not math.isfinite(loss):
                raise UserError(_DIVERGED)
            perplexity = math.exp(min(loss, 700.0))  # beyond, no float holds it
            found = {"accuracy": float(figures[1] / figures[2]), "loss": loss, "perplexity": perplexity}
        else:
            if not np.isfinite(logits).all():
                raise UserError(_DIVERGED)
            found = metrics.classification(logits, examples.labels, examples.class_names)
        return Evaluation(found, logits, count, time.perf_counter() - started)

    return evaluate
