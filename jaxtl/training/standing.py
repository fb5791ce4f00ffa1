"""How far a run has come, beside its parameters: counters, means, times, the best evaluation so far.

All of it is plain numbers, so that a checkpoint can hold it and a resumed run reports what an uninterrupted one would.
"""

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtl.models import stages
from jaxtl.training.evaluate import Evaluation


class Meter:
    """Running means over answers, and the time they took, from creation or `reset` to the last `add`."""

    def __init__(self, totals: np.ndarray | None = None, seconds: float = 0.0):
        """`totals` and `seconds` are those of a meter that this one goes on from."""
        self._totals = np.zeros(4) if totals is None else np.array(totals, np.float64)
        self.seconds = seconds
        self._started = time.perf_counter() - seconds

    def reset(self) -> None:
        """Starts anew."""
        self.__init__()

    def go_on(self) -> None:
        """Leaves out the time from the last `add` until now."""
        self._started = time.perf_counter() - self.seconds

    def add(self, figures: np.ndarray) -> None:
        """Adds [sum of losses, correct answers, answers, examples]."""
        self._totals += figures
        self.seconds = time.perf_counter() - self._started

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self._totals[0] / max(self._totals[2], 1))

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return float(self._totals[1] / max(self._totals[2], 1))

    @property
    def examples_per_second(self) -> float:
        """Speed; 0 before the first step."""
        return float(self._totals[3] / self.seconds) if self.seconds else 0.0

    @property
    def figures(self) -> dict[str, float]:
        """Loss, accuracy and speed, for metrics.jsonl."""
        speed = round(self.examples_per_second, 2)
        return {"loss": self.loss, "accuracy": self.accuracy, "examples_per_second": speed}

    def __str__(self) -> str:
        speed = self.examples_per_second
        return f"loss {self.loss:.4f} accuracy {self.accuracy:.4f} {speed:.{0 if speed >= 10 else 1}f} examples/s"

    def to_json(self) -> list[Any]:
        """Returns what `from_json` makes the same meter of, but for the time between the two."""
        return [self._totals.tolist(), self.seconds]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Meter":
        """The inverse of `to_json`."""
        return cls(np.array(data[0]), data[1])


@dataclasses.dataclass(frozen=True)
class Kept:
    """Parameters that may become the run's result.

    Attributes:
        step: training steps that made them.
        evaluation: on the held-out examples; its logits are not known where it was found before the run went on.
        params: trainable ones, on the host.
    """

    step: int
    evaluation: Evaluation
    params: stages.Params


@dataclasses.dataclass
class Standing:
    """How far a run has come.

    Attributes:
        step: training steps done.
        epoch: the one under way, from 1; it ends with its evaluation.
        meter: of the training steps of the epoch.
        line: of those since the last line in metrics.jsonl.
        skipped: steps whose update was not finite, and was left out; those of them that came last, in a row.
        before: the evaluation before the first step, of masked language modelling.
        kept: what may become the result; None before the first evaluation.
        seconds: `train`, `evaluate`, `waiting_for_input`, `cache`, `compile`, `before`: the last of the processes that
            ended before the run was done.
    """

    step: int = 0
    epoch: int = 1
    meter: Meter = dataclasses.field(default_factory=Meter)
    line: Meter = dataclasses.field(default_factory=Meter)
    skipped: int = 0
    skipped_in_a_row: int = 0
    before: dict[str, Any] | None = None
    kept: Kept | None = None
    seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it but the kept parameters, as plain data."""
        kept = self.kept and {
            "step": self.kept.step,
            "metrics": self.kept.evaluation.metrics,
            "examples": self.kept.evaluation.examples,
            "seconds": self.kept.evaluation.seconds,
        }
        plain = {name: getattr(self, name) for name in ("step", "epoch", "skipped", "skipped_in_a_row", "before")}
        meters = {"meter": self.meter.to_json(), "line": self.line.to_json()}
        return {**plain, **meters, "kept": kept, "seconds": dict(self.seconds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], params: stages.Params) -> "Standing":
        """The inverse of `to_json`; `params` are the kept ones."""
        kept = data["kept"] and Kept(
            data["kept"]["step"],
            Evaluation(data["kept"]["metrics"], None, data["kept"]["examples"], data["kept"]["seconds"]),
            params,
        )
        meters = {name: Meter.from_json(data[name]) for name in ("meter", "line")}
        seconds = collections.Counter(data["seconds"])
        return cls(**{**data, **meters, "kept": kept, "seconds": seconds})

    def close_epoch(self, *, last: bool) -> None:
        """Begins the next epoch; after the last one its means stay."""
        self.epoch += 1
        if not last:
            self.meter = Meter()
