"""Figures against published ones and arithmetic by hand; and what a person sees of them."""

import itertools
import warnings

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxtl.evaluation import metrics, terminal


def logits_of(confusion):
    """One-node logits and labels of a confusion matrix `[true][predicted]` of two classes."""
    labels, predictions = [], []
    for true, predicted in itertools.product(range(2), repeat=2):
        labels += [true] * confusion[true][predicted]
        predictions += [predicted] * confusion[true][predicted]
    return np.where(np.array(predictions) == 1, 2.0, -2.0)[:, None].astype(np.float32), np.array(labels, np.int32)


def random_logits(classes, count=200, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((count, classes)).astype(np.float32), random.integers(classes, size=count)


def test_the_studys_confusion_matrix_gives_the_studys_figures():
    """Of 2,140 test tweets: 968 fake and 1,103 real ones recognised, 52 and 17 not; accuracy .968, F1 of real .970."""
    found = metrics.classification(*logits_of([[968, 52], [17, 1103]]), ("fake", "real"))
    assert found["confusion"] == {"fake": {"fake": 968, "real": 52}, "real": {"fake": 17, "real": 1103}}
    assert found["accuracy"] == pytest.approx((968 + 1103) / 2140)
    assert round(found["accuracy"], 3) == 0.968
    assert found["precision"]["real"] == pytest.approx(1103 / (1103 + 52))
    assert found["recall"]["real"] == pytest.approx(1103 / (1103 + 17))
    assert found["f1"]["real"] == pytest.approx(2 * 1103 / (2 * 1103 + 52 + 17))
    assert round(found["f1"]["real"], 3) == 0.970
    fake = 2 * 968 / (2 * 968 + 52 + 17)
    assert found["f1"]["fake"] == pytest.approx(fake)
    assert found["f1_macro"] == pytest.approx((fake + found["f1"]["real"]) / 2)
    assert found["f1_weighted"] == pytest.approx((fake * 1020 + found["f1"]["real"] * 1120) / 2140)


def test_one_node_says_the_same_as_two_of_which_the_first_is_zero():
    """sigmoid(x) = softmax(0, x)."""
    one, labels = random_logits(1)
    labels = np.arange(200) % 2
    two = np.concatenate([np.zeros_like(one), one], axis=-1)
    first, second = (metrics.classification(logits, labels, ("a", "b")) for logits in (one, two))
    assert metrics.flat(first) == pytest.approx(metrics.flat(second), rel=1e-12)
    np.testing.assert_allclose(metrics.probabilities(one), metrics.probabilities(two), rtol=1e-12)


def test_the_loss_is_the_mean_cross_entropy_and_large_logits_do_not_overflow():
    logits = np.array([[1.0, 2.0, 0.5], [800.0, -800.0, 0.0]], np.float32)
    found = metrics.classification(logits, np.array([2, 1]), ("a", "b", "c"))
    first = np.log(np.exp([1.0, 2.0, 0.5]).sum()) - 0.5
    assert found["loss"] == pytest.approx((first + 1600) / 2)
    one = metrics.classification(np.array([[-800.0], [3.0]], np.float32), np.array([1, 1]), ("a", "b"))
    assert one["loss"] == pytest.approx((800 + np.log1p(np.exp(-3))) / 2)


def test_three_classes_agree_with_scikit_learn():
    logits, labels = random_logits(3)
    found = metrics.classification(logits, labels, ("a", "b", "c"))
    likely = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    each = [roc_auc_score(labels == number, likely[:, number]) for number in range(3)]
    assert found["roc_auc"] == pytest.approx(np.mean(each))
    predicted = logits.argmax(axis=-1)
    for number, name in enumerate("abc"):
        hits = np.sum((predicted == number) & (labels == number))
        assert found["precision"][name] == pytest.approx(hits / np.sum(predicted == number))
        assert found["recall"][name] == pytest.approx(hits / np.sum(labels == number))
        assert sum(found["confusion"][name].values()) == np.sum(labels == number)


def test_roc_auc_is_none_where_a_class_has_no_example():
    logits, labels = random_logits(3)
    for absent, names in ((np.ones_like(labels), "ab"), (labels % 2, "abc")):
        shape = 1 if len(names) == 2 else 3
        assert metrics.classification(logits[:, :shape], absent, tuple(names))["roc_auc"] is None
    assert metrics.classification(logits, labels, tuple("abc"))["roc_auc"] is not None


def test_a_class_never_predicted_has_zeros_and_no_warning():
    """A zero layer's logits, before training: all answers are the first class."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nodes, names in ((1, ("a", "b")), (3, ("a", "b", "c"))):
            labels = np.arange(6) % len(names)
            found = metrics.classification(np.zeros((6, nodes), np.float32), labels, names)
            for name in names[1:]:
                assert found["precision"][name] == found["recall"][name] == found["f1"][name] == 0
            assert found["recall"]["a"] == 1
            assert found["roc_auc"] == 0.5
        # And one that neither the labels nor the answers have.
        assert metrics.classification(np.zeros((6, 3), np.float32), np.zeros(6, int), names)["f1"]["c"] == 0


def test_flat_names_are_paths():
    found = metrics.flat({"accuracy": 0.5, "f1": {"real": 1.0}, "confusion": {"fake": {"real": 3}}, "test": None})
    assert found == {"accuracy": 0.5, "f1/real": 1.0, "confusion/fake/real": 3, "test": None}


# --- what is shown ---------------------------------------------------------------------------------------


def result(**more):
    found = metrics.classification(*logits_of([[8, 2], [1, 9]]), ("[fake]", "real"))
    figures = {"accuracy": found["accuracy"], "loss": found["loss"], "held_out": found, "test": None, "before": None}
    return {
        **figures, "train_loss": 0.125, "trainable_parameters": 1234, "total_parameters": 5678,
        "seconds_per_epoch": 1.5, "seconds_total": 9.0, "reported": {}, **more,
    }  # fmt: skip


def rows(capsys):
    """What was printed, one list of cells for each row of its tables."""
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_a_result_is_shown_by_class_and_beside_the_reported_figures(capsys, tmp_path):
    reported = {"accuracy": 0.968, "f1/real": 0.97, "confusion/[fake]/real": 52.0, "trainable_parameters": 1234.0}
    terminal.show_result(result(reported=reported), tmp_path, new=True)
    shown = rows(capsys)
    assert ["accuracy", "0.8500"] in shown
    assert ["[fake]", "0.8889", "0.8000", "0.8421", "8", "2"] in shown  # 8 / 9, 8 / 10, 16 / 19
    assert ["real", "0.8182", "0.9000", "0.8571", "1", "9"] in shown  # 9 / 11, 9 / 10, 18 / 21
    assert ["figure", "held out", "reported"] in shown
    assert ["accuracy", "0.8500", "0.9680"] in shown
    assert ["f1 real", "0.8571", "0.9700"] in shown
    assert ["confusion [fake] -> real", "2", "52"] in shown
    assert ["trainable_parameters", "1,234", "1,234"] in shown
    assert [str(tmp_path / "result.json")] in shown


def test_a_run_with_a_test_is_judged_by_the_test_and_shows_the_held_out_figures_too(capsys, tmp_path):
    test = metrics.classification(*logits_of([[10, 0], [0, 10]]), ("[fake]", "real"))
    terminal.show_result(result(test=test, reported={"f1/real": 0.97}), tmp_path, new=False)
    shown = rows(capsys)
    assert ["test", ""] in shown
    assert ["accuracy", "1.0000"] in shown
    assert ["f1 real", "1.0000", "0.9700"] in shown
    assert ["held-out accuracy", "0.8500"] in shown
    assert [f"finished before; {tmp_path / 'result.json'}"] in shown


def test_masked_language_modelling_shows_perplexity_before_and_after(capsys, tmp_path):
    figures = {"accuracy": 0.25, "loss": 2.0, "perplexity": 7.389}
    before = {"accuracy": 0.01, "loss": 4.0, "perplexity": 54.598}
    terminal.show_result(result(held_out=figures, before=before, accuracy=0.25, loss=2.0), tmp_path, new=True)
    shown = rows(capsys)
    assert ["perplexity", "7.39"] in shown
    assert ["held out, before training", "accuracy 0.0100, loss 4.0000, perplexity 54.5980"] in shown
