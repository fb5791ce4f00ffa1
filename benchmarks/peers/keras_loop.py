"""Training and evaluation in Keras on JAX, by `fit` and `predict`: what the models of all works share.

Keras compiles a step for every shape of batch: texts are grouped by length and filled up to a multiple of 32, and the
last batch of an epoch, if short, with examples of weight 0.
"""

import time
from typing import Any

import jax
import keras
import keras_hub
import numpy as np
from keras import ops

from benchmarks.peers import batches, recipe
from benchmarks.peers.score import Best, score
from benchmarks.prepare import Split
from jaxtl.config import Experiment, Head

_MULTIPLE = 32  # of the length of batches of texts


class _CompileTime:
    """When JAX traced and compiled."""

    def __init__(self):
        self._intervals: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._intervals.append((now - seconds, now))

    def since(self, begun: float) -> float:
        """Returns the seconds since then in which something was compiled; the intervals lie inside each other."""
        total, end = 0.0, begun
        for start, stop in sorted(self._intervals):
            total += max(stop - max(start, end), 0.0)
            end = max(end, stop)
        return total


class Batches(keras.utils.PyDataset):
    """Batches of one shape, or of few, by row numbers: (inputs, labels, weights)."""

    def __init__(self, split: Split, rows: list[np.ndarray], batch_size: int, max_length: int | None):
        super().__init__()
        self._split, self._rows, self._batch_size, self._max_length = split, rows, batch_size, max_length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray, np.ndarray]:
        real = self._rows[index]
        rows = np.resize(real, self._batch_size)
        weights = (np.arange(self._batch_size) < len(real)).astype(np.float32)
        labels = self._split.labels[rows]
        if self._max_length is None:
            return self._split.inputs[rows], labels, weights
        longest = int(self._split.lengths[rows].max())
        length = min(-(-longest // _MULTIPLE) * _MULTIPLE, self._max_length)
        ids, lengths = batches.padded(self._split, rows, length)
        return {"ids": ids, "mask": (np.arange(length) < lengths[:, None]).astype(np.int32)}, labels, weights


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then constant or decaying to zero."""

    def __init__(self, kind: str, peak: float, warmup: int, steps: int):
        self.kind, self.peak, self.warmup, self.steps = kind, peak, warmup, steps

    def __call__(self, step: Any) -> Any:
        """Returns the rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        done = ops.clip((step - self.warmup) / max(self.steps - self.warmup, 1), 0.0, 1.0)
        after = {"constant": 1.0 + 0.0 * done, "linear": 1.0 - done, "cosine": (1.0 + ops.cos(np.pi * done)) / 2}
        return self.peak * ops.where(step < self.warmup, step / max(self.warmup, 1), after[self.kind])


class GroupedAdam(keras.optimizers.Adam):
    """Adam with a rate of its own for the head, and weight decay of kernels."""

    def __init__(self, rate: Schedule, head_factor: float, decay: float, clip_norm: float):
        super().__init__(rate, epsilon=1e-8, global_clipnorm=clip_norm or None)
        self._head_factor, self._decay = head_factor, decay

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        if any(part.startswith("head_") for part in variable.path.split("/")):
            learning_rate = learning_rate * self._head_factor
        if self._decay and variable.path.endswith("kernel"):
            self.assign(variable, variable - variable * learning_rate * self._decay)
        super().update_step(gradient, variable, learning_rate)


class Pixels(keras.layers.Layer):
    """Images [batch, height, width, 3] uint8 -> as the model takes them, [batch, size, size, 3]."""

    def __init__(self, experiment: Experiment):
        super().__init__(trainable=False)
        self._size = (experiment.model.image_size,) * 2
        imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self._scale = imagenet if experiment.data.scale == "imagenet" else ((0.0,) * 3, (1.0,) * 3)

    def call(self, images: Any) -> Any:
        """Resizes and scales."""
        mean, deviation = (np.asarray(values, np.float32) for values in self._scale)
        pixels = ops.image.resize(ops.cast(images, "float32"), self._size, interpolation="bilinear", antialias=True)
        return ops.cast((pixels / 255 - mean) / deviation, self.compute_dtype)


def images_input() -> keras.KerasTensor:
    """Returns the input of models of images."""
    return keras.Input((None, None, 3), dtype="uint8", name="images")


def head(
    settings: Head, x: keras.KerasTensor, classes: int, mask: keras.KerasTensor | None = None
) -> keras.KerasTensor:
    """Returns logits float32 [batch, nodes]; initial values as in jaxtl."""
    if settings.kind == "bigru":
        bound = settings.hidden**-0.5
        names = ("kernel_initializer", "recurrent_initializer", "bias_initializer")
        uniform = {name: keras.initializers.RandomUniform(-bound, bound) for name in names}
        x = keras.layers.Bidirectional(keras.layers.GRU(settings.hidden, **uniform), name="head_gru")(x, mask=mask)
    if settings.kind == "mlp":
        uniform = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        x = keras.layers.Dense(settings.hidden, "relu", kernel_initializer=uniform, name="head_hidden")(x)
    x = keras.layers.Dropout(settings.dropout)(x)
    nodes = 1 if classes == 2 else classes
    return keras.layers.Dense(nodes, kernel_initializer="zeros", dtype="float32", name="head_output")(x)


def configure(experiment: Experiment) -> None:
    """Seeds, and sets the precision; to be called before the model is built."""
    keras.utils.set_random_seed(experiment.train.seed)
    if experiment.train.precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    else:
        jax.config.update("jax_default_matmul_precision", "float32")  # float32 means float32


def train(model: keras.Model, experiment: Experiment, train_set: Split, eval_set: Split) -> dict[str, Any]:
    """Trains and evaluates as the experiment says; see `torch_loop.train`."""
    settings, optim = experiment.train, experiment.optim
    steps = settings.epochs * recipe.steps_per_epoch(len(train_set.labels), settings.batch_size)
    groups, rates = recipe.learning(experiment.freeze), recipe.rates(experiment, model.width)
    base = rates[groups.backbone or groups.head]
    rate = Schedule(optim.schedule, base, recipe.warmup_steps(experiment, steps), steps)
    decay = optim.weight_decay if optim.name == "adamw" else 0.0
    kind = "BinaryCrossentropy" if model.output_shape[-1] == 1 else "SparseCategoricalCrossentropy"
    model.compile(
        optimizer=GroupedAdam(rate, rates[groups.head] / base, decay, optim.clip_norm),
        loss=getattr(keras.losses, kind)(from_logits=True, reduction="mean_with_sample_weight"),
    )
    random = np.random.default_rng(settings.seed)
    max_length = getattr(experiment.data, "max_length", None)
    compiling = _CompileTime()
    seconds, best, evaluations = {"train": 0.0, "evaluate": 0.0, "compile": 0.0}, Best(settings.select), []

    def timed(what: str, begun: float) -> None:
        compiled = compiling.since(begun)
        seconds["compile"] += compiled
        seconds[what] += time.perf_counter() - begun - compiled

    for epoch in range(1, settings.epochs + 1):
        begun = time.perf_counter()
        rows = batches.training_rows(train_set, settings.batch_size, random)
        history = model.fit(Batches(train_set, rows, settings.batch_size, max_length), verbose=0, shuffle=False)
        train_loss = float(history.history["loss"][0])
        timed("train", begun)
        print(f"epoch {epoch}: train loss {train_loss:.4f}", flush=True)
        if recipe.evaluates(experiment, epoch):
            begun = time.perf_counter()
            found = score(predict(model, eval_set, settings.eval_batch_size, max_length), eval_set.labels)
            timed("evaluate", begun)
            best.offer(found)
            evaluations.append((found.accuracy, found.loss))
            print(f"epoch {epoch}: held out {found}", flush=True)
    return {
        "accuracy": best.score.accuracy,
        "loss": best.score.loss,
        "evaluations": evaluations,
        "train_loss": train_loss,
        "trainable_parameters": sum(int(np.prod(variable.shape)) for variable in model.trainable_variables),
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


def predict(model: keras.Model, split: Split, batch_size: int, max_length: int | None) -> np.ndarray:
    """Returns logits float32 [examples, nodes], in the order of the examples."""
    order = batches.evaluation_rows(split, batch_size)
    found = model.predict(Batches(split, order, batch_size, max_length), verbose=0)
    # Only the last batch is filled up, at its end.
    logits = np.empty((len(split.labels), found.shape[1]), found.dtype)
    logits[np.concatenate(order)] = found[: len(logits)]
    return logits


def environment() -> dict[str, Any]:
    """Returns device and versions and, of an accelerator, its peak memory."""
    device = jax.devices()[0]
    versions = {"keras": keras.__version__, "keras-hub": keras_hub.__version__, "jax": jax.__version__}
    found: dict[str, Any] = {"device": device.device_kind, "versions": versions}
    memory = device.memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        found["peak_memory_bytes"] = int(memory["peak_bytes_in_use"])
    return found
