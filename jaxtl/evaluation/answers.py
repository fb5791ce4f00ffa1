"""Predictions as rows of a file: CSV for tables, JSON lines for programs; one row for each input, in its order."""

import csv
import json
from collections.abc import Sequence
from typing import TextIO

from jaxtl.data.inputs import Origin
from jaxtl.evaluation.predict import Prediction

FORMATS = (".csv", ".jsonl", ".json")

MANY_CLASSES = 20  # of more than these, not all are written unless they are asked for
FEW = 5  # the likeliest ones, which are written instead

_DIGITS = 6  # decimals of a probability: what float32 holds


class Table:
    """Writes CSV: where the input came from, label, probability, the probability of each class, error.

    Of the `top` likeliest classes: label, probability, label_2, probability_2, and so on.
    """

    def __init__(self, file: TextIO, classifies: str, class_names: Sequence[str], top: int | None):
        self._rows, self._names, self._top = csv.writer(file), class_names, top
        self._origin = _fields(classifies)
        ranked = (f"{field}_{rank}" for rank in range(2, (top or 0) + 1) for field in ("label", "probability"))
        answer = ranked if top else (f"p({name})" for name in class_names)
        self._columns = (*self._origin, "label", "probability", *answer, "error")
        self._rows.writerow(self._columns)

    def write(self, origin: Origin, answer: Prediction) -> None:
        """Adds a row."""
        found = [getattr(origin, field) for field in self._origin]
        if answer.error:
            blank = len(self._columns) - len(found) - 1
            self._rows.writerow((*found, *("",) * blank, answer.error))
            return
        likely = answer.probabilities
        if self._top:
            cells = [cell for name, value in likely.items() for cell in (name, _decimal(value))]
        else:
            cells = [answer.label, _decimal(answer.probability), *(_decimal(likely[name]) for name in self._names)]
        self._rows.writerow((*found, *cells, ""))


class Lines:
    """Writes JSON lines: where the input came from, label, probability, probabilities by class; or error."""

    def __init__(self, file: TextIO, classifies: str):
        self._file, self._origin = file, _fields(classifies)

    def write(self, origin: Origin, answer: Prediction) -> None:
        """Adds a line."""
        row = {field: getattr(origin, field) for field in self._origin}
        if answer.error:
            row["error"] = answer.error
        else:
            row |= {
                "label": answer.label,
                "probability": round(answer.probability, _DIGITS),
                "probabilities": {name: round(value, _DIGITS) for name, value in answer.probabilities.items()},
            }
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")


def shown(top: int | None, classes: int) -> int | None:
    """Returns how many of the likeliest classes are written; None: all, in their own order."""
    if top is None:
        return FEW if classes > MANY_CLASSES else None
    return min(top, classes)


def _fields(classifies: str) -> tuple[str, ...]:
    return ("file", "record", "text") if classifies == "texts" else ("file",)


def _decimal(value: float) -> str:
    return f"{value:.{_DIGITS}f}"
