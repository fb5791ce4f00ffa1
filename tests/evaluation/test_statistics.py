"""Intervals and tests: against arithmetic by hand, published examples, scipy, and simulated data."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtl.evaluation import metrics, statistics
from jaxtl.evaluation.statistics import Answers


def answers(right, classes=2, seed=0):
    """Answers of which these are right; the others name the class after the true one."""
    right = np.asarray(right, bool)
    labels = np.random.default_rng(seed).integers(classes, size=len(right))
    predicted = np.where(right, labels, (labels + 1) % classes)
    return Answers(labels, predicted, [str(number) for number in range(classes)])


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_scores_are_those_of_the_metrics(outputs):
    random, classes = np.random.default_rng(outputs), max(outputs, 2)
    names = [str(number) for number in range(classes)]
    logits, labels = random.normal(size=(40, outputs)), random.integers(classes - 1, size=40)  # a class never occurs
    expected = metrics.flat(metrics.classification(logits, labels, names))
    predicted = metrics.probabilities(logits).argmax(-1)
    found = statistics.scores(Answers(labels, predicted, names, metrics.losses(logits, labels)))
    for figure, values in found.items():
        np.testing.assert_allclose(values, [expected[figure]], err_msg=figure)


def test_weights_count_examples_as_often_as_they_are_repeated():
    once = answers([1, 1, 0, 1, 0, 0, 1], 3)
    times = np.array([0, 2, 1, 3, 1, 0, 2])
    rows = np.repeat(np.arange(7), times)
    repeated = statistics.scores(Answers(once.labels[rows], once.predicted[rows], once.class_names))
    weighted = statistics.scores(once, times[None].astype(float))
    for figure, values in repeated.items():
        np.testing.assert_allclose(weighted[figure], values, err_msg=figure)


def test_bootstrap_is_that_of_scipy():
    """The same method with other random numbers: the ends agree within what 2,000 draws leave to chance."""
    right = np.random.default_rng(1).random(300) < 0.8
    ours = statistics.percentile(statistics.bootstrap({"a": answers(right)})["a"]["accuracy"])
    theirs = scipy.stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=9_999, method="percentile", random_state=0
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.005)


def test_bootstrap_interval_holds_the_truth_as_often_as_it_says():
    """1,000 samples of 150 answers, 80 % right in truth: about 95 % of the intervals hold that.

    The standard error is 0.007. Counts of right answers are whole numbers, so that the true rate lies a little below.
    """
    random, held = np.random.default_rng(2), 0
    for _ in range(1_000):
        draws = statistics.bootstrap({"a": answers(random.random(150) < 0.8)}, draws=400)["a"]["accuracy"]
        low, high = statistics.percentile(draws)
        held += low <= 0.8 <= high
    assert 0.92 <= held / 1_000 <= 0.965


def test_bootstrap_is_repeatable_and_draws_the_same_examples_for_all_models():
    model = answers([1] * 30 + [0] * 10)
    first, second = (statistics.bootstrap({"a": model, "b": model}, draws=50) for _ in range(2))
    np.testing.assert_array_equal(first["a"]["accuracy"], second["a"]["accuracy"])
    np.testing.assert_array_equal(first["a"]["accuracy"], first["b"]["accuracy"])


def test_bootstrap_in_blocks_is_the_bootstrap(monkeypatch):
    model = answers([1] * 30 + [0] * 10)
    whole = statistics.bootstrap({"a": model}, draws=70)["a"]["f1_macro"]
    monkeypatch.setattr(statistics, "_BLOCK", 40 * 16)  # 16 draws at a time, and 6 in the end
    np.testing.assert_array_equal(statistics.bootstrap({"a": model}, draws=70)["a"]["f1_macro"], whole)


def test_mcnemar_by_hand():
    # One against nine: 2 (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024.
    first = np.array([True] * 50 + [True] + [False] * 9 + [False] * 5)
    second = np.array([True] * 50 + [False] + [True] * 9 + [False] * 5)
    assert statistics.mcnemar(first, second) == (1, 9, pytest.approx(22 / 1024))
    assert statistics.mcnemar(second, first) == (9, 1, pytest.approx(22 / 1024))


def test_mcnemar_of_a_published_example():
    """Agresti (2002), Categorical Data Analysis, table 10.1: 86 and 150 discordant, z^2 = 17.36, P = 0.00003."""
    first = np.array([True] * 794 + [True] * 150 + [False] * 86 + [False] * 570)
    second = np.array([True] * 794 + [False] * 150 + [True] * 86 + [False] * 570)
    found = statistics.mcnemar(first, second)
    assert found[:2] == (150, 86)
    assert 0.00003 < found.p < 0.00005  # the exact form lies a little above the asymptotic one


def test_mcnemar_of_models_that_answer_alike_finds_nothing():
    assert statistics.mcnemar(np.array([True, False]), np.array([True, False])) == (0, 0, 1.0)


def test_holm_by_hand():
    # In order .005 x 4, .01 x 3, .03 x 2, .04 x 1: the last may not be below the one before it.
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_p_value_and_that_of_bonferroni(p_values):
    for p, adjusted in zip(p_values, statistics.holm(p_values), strict=True):
        assert min(p, 1) <= adjusted <= min(p * len(p_values), 1)


def test_interval_over_seeds_by_hand():
    # 1 .. 5: mean 3, deviation sqrt(2.5), of the mean sqrt(0.5); t of 4 degrees of freedom is 2.776 (any table).
    found = statistics.over_seeds([1, 2, 3, 4, 5])
    np.testing.assert_allclose(found, [3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5], atol=1e-3)
    assert statistics.over_seeds([0.9]) is None
