"""What chance leaves of a figure, and of the difference between two: intervals and tests, from answers alone.

Pure functions. What is drawn is drawn from a fixed seed: the same answers have the same intervals.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.stats

LEVEL = 0.95  # of every interval
DRAWS = 2_000
_SEED = 0
_BLOCK = 4_000_000  # examples drawn at a time, which bounds the memory


class Interval(NamedTuple):
    """A confidence interval of `LEVEL`."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        labels, predicted: `[examples]` int, positions in `class_names`.
        class_names: names of the classes.
        losses: `[examples]`, the cross-entropy of each; None where there is none (of votes).
    """

    labels: np.ndarray
    predicted: np.ndarray
    class_names: Sequence[str]
    losses: np.ndarray | None = None

    @property
    def right(self) -> np.ndarray:
        """`[examples]` bool."""
        return self.labels == self.predicted


def scores(answers: Answers, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns `accuracy`, `loss`, `f1_macro`, `f1_weighted` and `f1/CLASS`, as `metrics.classification` defines them.

    Args:
        answers: of one model.
        weights: `[draws, examples]`, how often each example counts; None: once, as one draw.

    Returns:
        Each figure by name, `[draws]` float64.
    """
    labels, predicted, count = answers.labels, answers.predicted, len(answers.class_names)
    weights = np.ones((1, len(labels))) if weights is None else weights
    of_class, found, hits = (
        weights @ _one_hot(numbers, count, rows)
        for numbers, rows in ((labels, None), (predicted, None), (labels, answers.right))
    )
    total = weights.sum(axis=1)
    f1 = np.divide(2 * hits, of_class + found, out=np.zeros(hits.shape), where=of_class + found > 0)
    figures = {"accuracy": hits.sum(axis=1) / total}
    if answers.losses is not None:
        figures["loss"] = weights @ answers.losses / total
    figures |= {"f1_macro": f1.mean(axis=1), "f1_weighted": (f1 * of_class).sum(axis=1) / total}
    return figures | {f"f1/{name}": f1[:, number] for number, name in enumerate(answers.class_names)}


def bootstrap(models: Mapping[str, Answers], draws: int = DRAWS) -> dict[str, dict[str, np.ndarray]]:
    """Returns the scores of models on examples drawn anew, with replacement: the bootstrap (Efron 1979).

    All models see the same draws, so that differences between them are those of paired answers.

    Args:
        models: answers by name, all to the same examples.
        draws: number of samples.

    Returns:
        By model and figure (see `scores`), `[draws]`.
    """
    examples = len(next(iter(models.values())).labels)
    random = np.random.default_rng(_SEED)
    blocks: list[dict[str, dict[str, np.ndarray]]] = []
    for size in _blocks(draws, max(1, _BLOCK // examples)):
        rows = random.integers(examples, size=(size, examples)) + examples * np.arange(size)[:, None]
        weights = np.bincount(rows.ravel(), minlength=size * examples).reshape(size, examples).astype(np.float64)
        blocks.append({name: scores(answers, weights) for name, answers in models.items()})
    return {
        name: {figure: np.concatenate([block[name][figure] for block in blocks]) for figure in blocks[0][name]}
        for name in models
    }


def percentile(draws: np.ndarray) -> Interval:
    """Returns the bootstrap's percentile interval (Efron and Tibshirani 1993, chapter 13) of `[draws]`."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Returns Student's interval of the mean of independent repetitions; None of fewer than two."""
    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), float(scipy.stats.sem(values))
    half *= float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean - half, mean + half)


class McNemar(NamedTuple):
    """Two models on the same examples.

    Attributes:
        first, second: examples that only the first, and only the second, got right.
        p: how often at least so uneven a split would come about, were both equally likely to be the only one right.
    """

    first: int
    second: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Returns McNemar's test (1947) in its exact form: the sign test on the examples that one model only got right.

    Args:
        first, second: `[examples]` bool, whether each model got each example right.
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number as Holm (1979) does: the family-wise error rate is kept."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors), 1)
    found = np.empty(len(order))
    found[order] = adjusted
    return found.tolist()


def _one_hot(numbers: np.ndarray, count: int, rows: np.ndarray | None) -> scipy.sparse.csr_array:
    """Returns `[len(numbers), count]`, 1 at each number, in `rows` only where that is given."""
    places = np.arange(len(numbers))
    ones = np.ones(len(numbers)) if rows is None else rows.astype(np.float64)
    return scipy.sparse.csr_array((ones, (places, numbers)), shape=(len(numbers), count))


def _blocks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
