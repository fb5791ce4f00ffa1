"""Accuracy and loss from logits, and which evaluation is kept."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy, and the mean cross-entropy."""

    accuracy: float
    loss: float

    def better_than(self, other: "Score") -> bool:
        """By accuracy, then loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Returns the score of logits `[n, classes]`, or `[n, 1]`: of the second of two classes."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:  # one node for two classes: the other's logit is zero
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    rows = np.arange(len(labels))
    losses = np.logaddexp.reduce(logits, axis=1) - logits[rows, labels]
    return Score(float(np.mean(logits.argmax(1) == labels)), float(np.mean(losses)))


class Best:
    """The evaluation a run is judged by: the last, or the best so far."""

    def __init__(self, select: str):
        self._select = select
        self.score: Score | None = None

    def offer(self, found: Score) -> None:
        """Takes what an evaluation found."""
        if self._select == "last" or self.score is None or found.better_than(self.score):
            self.score = found
