"""Figures of merit, from logits and labels alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

_PER_CLASS = ("precision", "recall", "f1")


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the probability of each class, `[examples, classes]` float64.

    Args:
        logits: `[examples, classes]`, or `[examples, 1]`: of the second of two classes.
    """
    logits = logits.astype(np.float64)
    if logits.shape[-1] == 1:
        return np.concatenate([expit(-logits), expit(logits)], axis=-1)
    return softmax(logits, axis=-1)


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the cross-entropy (natural logarithm) of each example, `[examples]` float64.

    Args:
        logits: as in `classification`.
        labels: `[examples]` int.
    """
    logits = logits.astype(np.float64)
    if logits.shape[-1] == 1:
        return -log_expit(np.where(labels == 1, logits[:, 0], -logits[:, 0]))
    return -log_softmax(logits, axis=-1)[np.arange(len(labels)), labels]


def classification(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns what is commonly reported of a classifier, by name.

    `accuracy`; `loss`, the mean cross-entropy (natural logarithm); `precision`, `recall` and `f1`, each by class name,
    and `.._macro` (mean over the classes) and `.._weighted` (by their number of examples), 0 where a class is never
    predicted; `roc_auc`: area under the receiver operating characteristic, of more than two classes the mean of each
    against the rest, None where a class has no example; `confusion[true class][predicted class]`: numbers of examples.

    Args:
        logits: `[examples, classes]` float, or `[examples, 1]`: of the second of two classes.
        labels: `[examples]` int, positions in `class_names`.
        class_names: names of the classes.
    """
    likely = probabilities(logits)
    predicted = np.argmax(likely, axis=-1)
    numbers = np.arange(len(class_names))
    found: dict[str, Any] = {
        "accuracy": float(np.mean(predicted == labels)),
        "loss": float(np.mean(losses(logits, labels))),
    }
    by_class = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0.0)
    for name, values in zip(_PER_CLASS, by_class, strict=False):
        found[name] = {label: float(value) for label, value in zip(class_names, values, strict=True)}
    for average in ("macro", "weighted"):
        means = precision_recall_fscore_support(labels, predicted, labels=numbers, average=average, zero_division=0.0)
        found |= {f"{name}_{average}": float(value) for name, value in zip(_PER_CLASS, means, strict=False)}
    found["roc_auc"] = _roc_auc(likely, labels)
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    found["confusion"] = {
        true: {name: int(count) for name, count in zip(class_names, row, strict=True)}
        for true, row in zip(class_names, matrix, strict=True)
    }
    return found


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How far a classifier can be believed, by the probability of its answers (confidence).

    Attributes:
        error: expected calibration error: the mean over the examples of |accuracy - confidence| of their bin.
        edges: `[bins + 1]`, of equally wide bins of confidence from 0 to 1.
        counts: `[bins]` examples.
        accuracy, confidence: `[bins]` means, NaN where there is no example.
    """

    error: float
    edges: np.ndarray
    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray


def calibration(likely: np.ndarray, labels: np.ndarray, bins: int = 10) -> Calibration:
    """Returns the calibration of answers: Guo et al. 2017 (arXiv:1706.04599), equations 1 to 3.

    Args:
        likely: probability of each class, `[examples, classes]`.
        labels: `[examples]` int.
        bins: their number; each holds its upper edge.
    """
    edges = np.linspace(0, 1, bins + 1)
    confidence = likely.max(axis=-1)
    right = likely.argmax(axis=-1) == labels
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (right, confidence)]
    means = [np.divide(found, counts, out=np.full(bins, np.nan), where=counts > 0) for found in sums]
    error = np.abs(sums[0] - sums[1]).sum() / max(len(labels), 1)
    return Calibration(float(error), edges, counts, *means)


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns nested figures by path: `f1/real`, `confusion/fake/real`."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}/"))
        else:
            found[prefix + name] = value
    return found


def _roc_auc(likely: np.ndarray, labels: np.ndarray) -> float | None:
    classes = likely.shape[1]
    if len(np.unique(labels)) < classes:
        return None
    if classes == 2:
        return float(roc_auc_score(labels, likely[:, 1]))
    return float(roc_auc_score(labels, likely, multi_class="ovr", labels=np.arange(classes)))
