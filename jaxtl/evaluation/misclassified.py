"""What a model got wrong: a table for people to read."""

import csv
from pathlib import Path

import numpy as np

from jaxtl import storage
from jaxtl.data.listing import Examples
from jaxtl.evaluation import metrics

FILE = "misclassified.csv"


def write(path: Path, examples: Examples, logits: np.ndarray) -> None:
    """Writes the misclassified examples as CSV: id, text, label, prediction, probability; most confident errors first.

    Args:
        path: the file.
        examples: the split; images have no `text`.
        logits: of the model, in the order of the examples; see `metrics.probabilities`.
    """
    likely = metrics.probabilities(logits)
    predicted = np.argmax(likely, axis=-1)
    wrong = np.flatnonzero(predicted != examples.labels)
    wrong = wrong[np.argsort(-likely[wrong, predicted[wrong]], kind="stable")]
    columns = ("id", *(("text",) if examples.texts else ()), "label", "prediction", "probability")
    with storage.written_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in wrong:
            texts = (examples.texts[row],) if examples.texts else ()
            names = (examples.class_names[examples.labels[row]], examples.class_names[predicted[row]])
            writer.writerow((examples.ids[row], *texts, *names, f"{likely[row, predicted[row]]:.4f}"))
