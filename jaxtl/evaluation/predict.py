"""Finished runs, ready to say what they make of new texts or images; see `jaxtl.load`.

Inputs are taken a window at a time: a thread reads the next one, decodes it or cuts it into word pieces, and sorts
it into batches, while the device is at work on those of the one before. Batches have a few fixed shapes, so that
nothing is compiled twice and any number of inputs takes the same memory.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image

from jaxtl.config import Text
from jaxtl.data import buckets, decode, records, tokens
from jaxtl.errors import UserError
from jaxtl.evaluation import ensemble, metrics
from jaxtl.models import kernels, stages
from jaxtl.training import step
from jaxtl.training.compiled import behind
from jaxtl.training.evaluate import image_preparation
from jaxtl.training.network import TOKENIZER, FinishedRun, load_run, run_params

T = TypeVar("T")
Key = TypeVar("Key")

Input = str | os.PathLike | Image.Image | np.ndarray
"""Of a run on texts a string. Of one on images a path, a Pillow image, or an array `[height, width, 3]` uint8."""

WINDOW = {"texts": 16, "images": 4}
"""Batches of a window; texts of like length are put together from among those of one."""

_CHARACTERS = 1 << 24  # in a window at most, so that one of long documents is not large either
_AHEAD = 2  # batches sent to the device before the answer to the first of them is read
_FEW = (1, 8)  # rows of the batch where there are no more inputs than that


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        label: the class; None where the input could not be read.
        probability: of that class; of an ensemble that votes, the share of the votes. None where there is no label.
        probabilities: of the classes, by name, the likeliest first: of all, or of as many as were asked for.
        error: why there is no answer; empty where there is one.
    """

    label: str | None
    probability: float | None
    probabilities: dict[str, float]
    error: str = ""


class Predictor:
    """One finished run, or several that answer together.

    Attributes:
        class_names: names of the classes, in the order of the first run.
        classifies: what it takes: `texts` or `images`.
        text_column: the column that the texts of the first run were in; empty of images.
    """

    def __init__(self, folders: Sequence[Path], rule: ensemble.Rule = "mean", batch_size: int | None = None):
        """See `jaxtl.load`.

        Raises:
            UserError: a folder holds no finished run that tells classes apart, or the runs do not go together.
        """
        if not folders:
            raise UserError("there is no run to load: name its folder")
        if rule not in ensemble.RULES:
            raise UserError(f"ensemble={rule}: there are {' and '.join(ensemble.RULES)}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least one input is taken at a time")
        runs = [_finished(folder) for folder in folders]
        kinds = [_kind(run) for run in runs]
        if other := next((run for run, kind in zip(runs, kinds, strict=True) if kind != kinds[0]), None):
            raise UserError(
                f"{runs[0].folder} classifies {kinds[0]}, {other.folder} {_kind(other)}: an ensemble is of one kind"
            )
        self._columns = ensemble.columns([(str(run.folder), run.class_names) for run in runs])
        self.class_names, self.classifies, self._rule = runs[0].class_names, kinds[0], rule
        self.text_column = runs[0].experiment.data.text_column if kinds[0] == "texts" else ""
        make = _TextMember if kinds[0] == "texts" else _ImageMember
        self._members = [make(run, batch_size or run.experiment.train.eval_batch_size) for run in runs]

    def predict(self, inputs: Iterable[Input], top: int | None = None) -> list[Prediction]:
        """Returns what the model says of each input.

        Args:
            inputs: see `Input`. One that cannot be read (an empty text, a damaged image) becomes an answer with an
                `error`, and the others are answered.
            top: number of classes in `Prediction.probabilities`, the likeliest ones; None: all.

        Raises:
            UserError: an input is of another kind than the run takes.
        """
        return list(self.stream(inputs, top))

    def stream(self, inputs: Iterable[Input], top: int | None = None) -> Iterator[Prediction]:
        """Yields what `predict` returns, over any number of inputs in the same memory.

        `inputs` is taken in another thread, some windows of sixteen batches of texts, or four of images, in advance.
        """
        return (answer for _, answer in self.answers(((None, one) for one in _several(inputs)), top))

    def predict_proba(self, inputs: Iterable[Input]) -> np.ndarray:
        """Returns the probability of each class, `[inputs, classes]` float64, columns as in `class_names`.

        Raises:
            UserError: an input cannot be read, or is of another kind than the run takes.
        """
        found = []
        for number, fault, likely, _ in self._outcomes(enumerate(_several(inputs)), _unseen):
            if fault:
                raise UserError(f"input {number}: {fault}")
            found.append(likely)
        return np.stack(found) if found else np.empty((0, len(self.class_names)))

    def answers(
        self,
        pairs: Iterable[tuple[Key, Input | UserError]],
        top: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[Key, Prediction]]:
        """Yields (key, answer) of (key, input), or of (key, why there is none), in their order.

        Args:
            pairs: the inputs; a key is whatever tells which one it is.
            top: see `predict`.
            advance: told how many inputs more have been answered.
        """
        if top is not None and top < 1:
            raise UserError(f"top={top}: at least one class is shown")
        for key, fault, likely, ranking in self._outcomes(pairs, advance or _unseen):
            if fault:
                yield key, Prediction(None, None, {}, fault)
                continue
            best = [(self.class_names[number], float(likely[number])) for number in ranking[:top]]
            yield key, Prediction(*best[0], dict(best))

    def _outcomes(
        self, pairs: Iterable[tuple[Key, Input | UserError]], advance: Callable[[int], None]
    ) -> Iterator[tuple[Key, str, np.ndarray | None, np.ndarray | None]]:
        """Yields (key, fault or '', probabilities `[classes]`, classes by number, the likeliest first)."""
        for window, member, rows, logits in behind(self._sent(pairs), _AHEAD):
            if member is None:
                advance(len(window.keys) - len(window.answered))
                yield from self._complete(window)
                continue
            likely = metrics.probabilities(np.asarray(logits)[: len(rows)])
            window.found[member, rows] = likely[:, self._columns[member]]
            if member == len(self._members) - 1:
                advance(len(rows))

    def _sent(self, pairs: Iterable[tuple[Key, Input | UserError]]) -> Iterator[tuple]:
        """Yields (window, member, rows, its logits under way) of every batch, and (window, None, ..) after its last."""
        for window in _in_advance(self._windows(iter(pairs))):
            for member, rows, inputs in window.batches:
                yield window, member, rows, self._members[member].forward(inputs)
            window.batches.clear()
            yield window, None, None, None

    def _windows(self, pairs: Iterator[tuple[Key, Input | UserError]]) -> Iterator["_Window"]:
        count = WINDOW[self.classifies] * max(member.batch_size for member in self._members)
        first = True
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            while taken := list(_taken(pairs, count)):
                # Compiled shapes are for many inputs, but to fill up a batch for a few of them takes far too long.
                yield self._window(taken, threads, few=first and len(taken) < count)
                first = False

    def _window(
        self, taken: Sequence[tuple[Key, Input | UserError]], threads: ThreadPoolExecutor, few: bool
    ) -> "_Window":
        faults, answered, values = [""] * len(taken), [], []
        look = _text if self.classifies == "texts" else partial(_pixels, self._members)
        # Images take long to decode, outside of Python's lock; a look at a text takes nothing.
        seen = (map if self.classifies == "texts" else threads.map)(look, (value for _, value in taken))
        for number, value in enumerate(seen):
            if isinstance(value, UserError):
                faults[number] = str(value)
            else:
                answered.append(number)
                values.append(value)
        batches = []
        for number, member in enumerate(self._members if values else ()):
            size = member.batch_size
            if few:
                size = next((rows for rows in _FEW if len(values) <= rows < size), size)
            own = values if self.classifies == "texts" else [arrays[number] for arrays in values]
            batches += [(number, rows, inputs) for rows, inputs in member.batches(own, size)]
        found = np.empty((len(self._members), len(values), len(self.class_names)))
        return _Window([key for key, _ in taken], faults, np.array(answered, np.int64), batches, found)

    def _complete(self, window: "_Window") -> Iterator[tuple]:
        combined = ensemble.combine(list(window.found), self._rule)
        finite = np.isfinite(window.found).all(axis=(0, 2))
        row = dict(zip(window.answered.tolist(), range(len(window.answered)), strict=True))
        for number, (key, fault) in enumerate(zip(window.keys, window.faults, strict=True)):
            if not fault and not finite[row[number]]:
                fault = "the model's answer is not a finite number"
            if fault:
                yield key, fault, None, None
            else:
                yield key, "", combined.probabilities[row[number]], combined.ranking[row[number]]


@dataclasses.dataclass
class _Window:
    """Some inputs, answered together.

    Attributes:
        keys: which they are.
        faults: why there is no answer to each; '' where there is one.
        answered: numbers of those without a fault, `[answered]`.
        batches: (number of the member, rows of `found`, what the device takes).
        found: probabilities, `[members, answered, classes]`.
    """

    keys: list[Any]
    faults: list[str]
    answered: np.ndarray
    batches: list[tuple[int, np.ndarray, Any]]
    found: np.ndarray


class _Member:
    """A run, on the device."""

    def __init__(self, run: FinishedRun, batch_size: int):
        self.batch_size = batch_size
        net, params = run_params(run)
        self._params = jax.device_put(params)
        forward = step.forward(net.structure, self._preparation(run))
        self._step = jax.jit(forward, compiler_options=kernels.compiler_options(run.experiment.train.precision))

    def forward(self, inputs: Any) -> jax.Array:
        """Returns the logits of a batch, before they are computed."""
        return self._step(self._params, {}, {"input": jax.device_put(inputs)})

    def _preparation(self, run: FinishedRun) -> step.Prepare:
        return step.unchanged

    def batches(self, values: Sequence[Any], size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields (rows of `values`, what `forward` takes) in batches of `size` rows, the last one filled up."""
        raise NotImplementedError


class _TextMember(_Member):
    def __init__(self, run: FinishedRun, batch_size: int):
        super().__init__(run, batch_size)
        self._tokenizer = tokens.load_tokenizer(run.folder / TOKENIZER)
        self._lengths = batch_lengths(run.experiment.data.max_length)

    def batches(self, values: Sequence[str], size: int) -> Iterator[tuple[np.ndarray, stages.Sequence]]:
        ids = tokens.tokenise(values, self._tokenizer, self._lengths[-1])
        for rows, length in buckets.group(ids.lengths, self._lengths, size, None):
            full = _filled(rows, size)
            yield rows, stages.Sequence(ids.padded(full, length), ids.lengths[full].astype(np.int32))


class _ImageMember(_Member):
    def __init__(self, run: FinishedRun, batch_size: int):
        self.shape, self.resize = run.image_shape, run.experiment.data.resize
        super().__init__(run, batch_size)

    def _preparation(self, run: FinishedRun) -> step.Prepare:
        return image_preparation(run.experiment)

    def batches(self, values: Sequence[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(values), size):
            rows = np.arange(start, min(start + size, len(values)))
            yield rows, np.stack([values[row] for row in _filled(rows, size)])


def batch_lengths(limit: int) -> tuple[int, ...]:
    """Returns the lengths that batches of texts are filled up to, ascending; the last is `limit`.

    They do not depend on the texts, as those of training do: what was compiled for one file serves the next. Of each
    doubling there are 1, 5/4 and 3/2, in multiples of 8: tweets fill 83 % of their batches, with half as many lengths
    as multiples of 8 are, which fill 86 %.
    """
    lengths = {-(-(quarters << power) // 8) * 8 for power in range(2, limit.bit_length()) for quarters in (4, 5, 6)}
    return (*sorted(length for length in lengths if length < limit), limit)


def _finished(folder: Path) -> FinishedRun:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    run = load_run(folder)
    if run.experiment.model.head.kind == "mlm" or not run.class_names:
        raise UserError(
            f"{folder} tells no classes apart: it was trained on masked language modelling; train a classifier that "
            f"starts from it, with --set model.weights={folder}"
        )
    return run


def _kind(run: FinishedRun) -> str:
    return "texts" if isinstance(run.experiment.data, Text) else "images"


def _several(inputs: Iterable[Input]) -> Iterable[Input]:
    if isinstance(inputs, str | os.PathLike | Image.Image):
        raise UserError("a list of inputs is wanted: write predict([..]), for a single one too")
    return inputs


def _text(value: Any) -> str | UserError:
    """Returns a text that can be tokenised, or why there is none; raises UserError for what is no text."""
    if isinstance(value, UserError):
        return value
    if not isinstance(value, str):
        raise UserError(f"the run classifies texts, and an input is a {type(value).__name__}: give strings")
    return records.whole(value) if value.strip() else UserError("no text")


def _pixels(members: Sequence[_ImageMember], value: Any) -> list[np.ndarray] | UserError:
    """Returns the pixels as each member takes them, or why there are none; raises UserError for what is no image."""
    if isinstance(value, UserError):
        return value
    if isinstance(value, str | os.PathLike):
        opener = partial(Image.open, value)
    elif isinstance(value, Image.Image):
        opener = value.copy  # it is turned upright in its place, and closed
    elif isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] == 3:
        opener = partial(Image.fromarray, value)
    else:
        what = f"an array {list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(
            f"the run classifies images, and an input is {what}: give paths, Pillow images or arrays "
            "[height, width, 3] uint8"
        )
    try:
        image = decode.rgb(opener)
    except UserError as error:
        return error
    return [decode.fit(image, member.shape, member.resize) for member in members]


def _taken(pairs: Iterator[tuple[Key, Any]], count: int) -> Iterator[tuple[Key, Any]]:
    """Yields the pairs of a window: `count` of them, or fewer where their texts are long."""
    characters = 0
    for pair in itertools.islice(pairs, count):
        yield pair
        characters += len(pair[1]) if isinstance(pair[1], str) else 0
        if characters > _CHARACTERS:
            return


def _in_advance(items: Iterator[T]) -> Iterator[T]:
    """Yields the items, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns `size` rows: the first one again for those that are missing."""
    return np.concatenate([rows, np.full(size - len(rows), rows[0])])


def _unseen(count: int) -> None:
    """The `advance` that shows nothing."""
