"""Figures of merit, from logits and labels alone."""

import numpy as np
from scipy.special import log_softmax


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns accuracy and mean cross-entropy (natural logarithm).

    Args:
        logits: [examples, classes] float.
        labels: [examples] int.
    """
    log_probabilities = log_softmax(logits.astype(np.float64), axis=-1)
    return {
        "accuracy": float(np.mean(np.argmax(logits, axis=-1) == labels)),
        "loss": float(-np.mean(log_probabilities[np.arange(len(labels)), labels])),
    }
