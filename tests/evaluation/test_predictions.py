"""What a run answered, kept as arrays: read back as it was, and never taken for sound when it is not."""

import numpy as np
import pytest

from jaxtl.errors import UserError
from jaxtl.evaluation import predictions
from jaxtl.evaluation.predictions import Predictions

FOUND = Predictions(
    ("a/1.png", "b/ü 😷.png", "c"),
    np.array([0, 2, 1], np.int32),
    np.array([[1, 0, 0], [0, 1, 0], [0, 3, 0]], np.float32),
)


def test_arrays_are_read_back_as_they_were(tmp_path):
    predictions.write(tmp_path / "p.npz", FOUND)
    read = predictions.read(tmp_path / "p.npz", 3)
    assert read.ids == FOUND.ids
    np.testing.assert_array_equal(read.labels, FOUND.labels)
    np.testing.assert_array_equal(read.logits, FOUND.logits)
    np.testing.assert_allclose(read.probabilities.sum(-1), 1)


def test_errors_come_first_the_most_confident_ahead():
    # Row 1 is wrong; 2 is right and surer than 0.
    assert predictions.errors_first(FOUND.probabilities, FOUND.labels).tolist() == [1, 2, 0]


def damaged(path, kind):
    if kind == "missing":
        return
    predictions.write(path, FOUND)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "no archive":
        path.write_bytes(b"PK but no archive")
    elif kind == "pickle":  # would be executed, were it loaded
        np.savez(path, ids=np.array([{"a": 1}], object), labels=FOUND.labels, logits=FOUND.logits)
    elif kind == "label out of range":
        np.savez(path, ids=np.array(FOUND.ids), labels=np.array([0, 9, 1], np.int32), logits=FOUND.logits)
    elif kind == "other shapes":
        np.savez(path, ids=np.array(FOUND.ids), labels=FOUND.labels, logits=FOUND.logits[:2])
    elif kind == "not finite":
        np.savez(path, ids=np.array(FOUND.ids), labels=FOUND.labels, logits=FOUND.logits * np.nan)


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "no archive", "pickle", "label out of range", "other shapes", "not finite"]
)
def test_what_is_not_sound_is_told(tmp_path, kind):
    damaged(tmp_path / "p.npz", kind)
    with pytest.raises(UserError, match=r"there is no .*p\.npz" if kind == "missing" else r"p\.npz is damaged"):
        predictions.read(tmp_path / "p.npz", 3)
