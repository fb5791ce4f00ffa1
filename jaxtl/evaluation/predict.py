"""What a finished run says of new texts: probabilities, in batches of a few shapes, over any number of texts."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from jaxtl.config import Text
from jaxtl.data import loader, tokens
from jaxtl.data.listing import Examples
from jaxtl.errors import UserError
from jaxtl.evaluation import metrics
from jaxtl.training import step
from jaxtl.training.network import TOKENIZER, load_run, run_params
from jaxtl.training.setup import batch_lengths

_AT_ONCE = 4096  # texts held in memory together


class TextClassifier:
    """A finished run on texts, ready to predict.

    Attributes:
        class_names: names of the classes.
        data: the run's data settings: columns, length.
    """

    def __init__(self, folder: Path):
        """Loads the run in `folder`.

        Raises:
            UserError: there is no finished run that tells classes of texts apart.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such run folder")
        run = load_run(folder)
        if not isinstance(run.experiment.data, Text) or run.experiment.model.head.kind == "mlm":
            raise UserError(f"{folder} does not hold a run that classifies texts")
        self.class_names = run.class_names
        self.data = run.experiment.data
        self._tokenizer = tokens.load_tokenizer(folder / TOKENIZER)
        net, params = run_params(run)
        self._params = jax.device_put(params)
        self._forward = step.forward(net.structure, step.unchanged)
        self._batch_size = run.experiment.train.eval_batch_size
        self._lengths: tuple[int, ...] = ()
        self._rows = 1

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the probability of each class, `[texts, classes]` float64."""
        if not texts:
            return np.empty((0, len(self.class_names)))
        ids = tokens.tokenise(texts, self._tokenizer, self.data.max_length)
        # Shapes are kept from call to call, so that more texts compile nothing new unless they are longer.
        if not self._lengths or ids.lengths.max() > self._lengths[-1]:
            self._lengths = batch_lengths([ids.lengths], self.data)
        self._rows = max(self._rows, min(self._batch_size, len(texts)))
        examples = Examples(ids, np.zeros(len(texts), np.int32), self.class_names, ())
        found = np.empty((len(texts), len(self.class_names)))
        for batch in loader.batches(examples, self._rows, seed=None, lengths=self._lengths):
            real = batch["index"] >= 0
            logits = np.asarray(self._forward(self._params, {}, {"input": jax.device_put(batch["input"])}))
            found[batch["index"][real]] = metrics.probabilities(logits)[real]
        return found

    def stream(self, records: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str, np.ndarray]]:
        """Yields (number, text, probabilities) of (number, text), a few thousand at a time.

        Raises:
            UserError: an empty text.
        """
        waiting: list[tuple[int, str]] = []
        for number, text in records:
            if not text.strip():
                raise UserError(f"record {number} has no text; remove it")
            waiting.append((number, text))
            if len(waiting) == _AT_ONCE:
                yield from self._answers(waiting)
                waiting = []
        yield from self._answers(waiting)

    def _answers(self, waiting: list[tuple[int, str]]) -> Iterator[tuple[int, str, np.ndarray]]:
        for (number, text), likely in zip(waiting, self([text for _, text in waiting]), strict=True):
            yield number, text, likely


def write(answers: Iterable[tuple[int, str, np.ndarray]], class_names: Sequence[str], file: TextIO) -> int:
    """Writes answers as CSV: record, text, label, probability, and the probability of each class. Returns how many."""
    writer = csv.writer(file)
    writer.writerow(("record", "text", "label", "probability", *(f"p({name})" for name in class_names)))
    count = 0
    for number, text, likely in answers:
        best = int(np.argmax(likely))
        writer.writerow((number, text, class_names[best], f"{likely[best]:.4f}", *(f"{p:.4f}" for p in likely)))
        count += 1
    return count
