"""Figures of merit, from logits and labels alone."""

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
    logits = logits.astype(np.float64)
    if logits.shape[-1] == 1:
        losses = -log_expit(np.where(labels == 1, logits[:, 0], -logits[:, 0]))
    else:
        losses = -log_softmax(logits, axis=-1)[np.arange(len(labels)), labels]
    numbers = np.arange(len(class_names))
    found: dict[str, Any] = {"accuracy": float(np.mean(predicted == labels)), "loss": float(np.mean(losses))}
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


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns nested figures by path: `f1/real`, `confusion/fake/real`."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _roc_auc(likely: np.ndarray, labels: np.ndarray) -> float | None:
    classes = likely.shape[1]
    if len(np.unique(labels)) < classes:
        return None
    if classes == 2:
        return float(roc_auc_score(labels, likely[:, 1]))
    return float(roc_auc_score(labels, likely, multi_class="ovr", labels=np.arange(classes)))
