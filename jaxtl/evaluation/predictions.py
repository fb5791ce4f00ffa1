"""What a run answered on the examples that it is judged by: as arrays for programs, and as a table for people."""

import csv
import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from jaxtl import storage
from jaxtl.data.listing import Examples
from jaxtl.errors import UserError
from jaxtl.evaluation import metrics

ARRAYS, TABLE = "predictions.npz", "predictions.csv"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Answers to labelled examples, in the order of the data set.

    Attributes:
        ids: names of the examples, see `jaxtl.data.listing.Examples`.
        labels: `[examples]` int32, positions in the run's classes.
        logits: `[examples, classes]` float32, or `[examples, 1]`: of the second of two classes.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Of each class, `[examples, classes]` float64."""
        return metrics.probabilities(self.logits)


def write(path: Path, found: Predictions) -> None:
    """Writes the arrays as an .npz file, whole or not at all.

    Raises:
        UserError: that cannot be done.
    """
    with storage.written_whole(path, binary=True) as file:
        np.savez(file, ids=np.array(found.ids, np.str_), labels=found.labels, logits=found.logits)


def read(path: Path, classes: int) -> Predictions:
    """Returns what `write` wrote. Nothing in the file is executed.

    Args:
        path: the file.
        classes: number of classes that the run tells apart.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, labels, logits = (arrays[name] for name in ("ids", "labels", "logits"))
        rows = len(ids)
        shapes = labels.shape == ids.shape == (rows,) and logits.shape in ((rows, classes), (rows, 1))
        kinds = ids.dtype.kind == "U" and labels.dtype.kind == "i" and logits.dtype.kind == "f"
        if not (shapes and kinds and np.isfinite(logits).all() and ((labels >= 0) & (labels < classes)).all()):
            raise ValueError("its arrays are not those of a run with these classes")
    except FileNotFoundError:
        raise UserError(f"there is no {path}: the run there has not finished, or tells no classes apart") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return Predictions(tuple(ids.tolist()), labels, logits)


def write_table(path: Path, examples: Examples, logits: np.ndarray) -> None:
    """Writes every example as CSV: id, text, label, prediction, probability; most confident errors first.

    Args:
        path: the file.
        examples: the split; images have no `text`.
        logits: of the model, in the order of the examples; see `metrics.probabilities`.
    """
    likely = metrics.probabilities(logits)
    predicted = np.argmax(likely, axis=-1)
    columns = ("id", *(("text",) if examples.texts else ()), "label", "prediction", "probability")
    with storage.written_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in errors_first(likely, examples.labels):
            texts = (examples.texts[row],) if examples.texts else ()
            names = (examples.class_names[examples.labels[row]], examples.class_names[predicted[row]])
            writer.writerow((examples.ids[row], *texts, *names, f"{likely[row, predicted[row]]:.4f}"))


def errors_first(likely: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the row numbers in the order in which a person reads them: errors, most confident first, then the rest.

    Args:
        likely: probability of each class, `[examples, classes]`.
        labels: `[examples]`.
    """
    predicted = np.argmax(likely, axis=-1)
    return np.lexsort((-likely[np.arange(len(labels)), predicted], predicted == labels))
