"""Probabilities of several runs, put together by numbers that one can follow."""

import numpy as np
import pytest

from jaxtl.errors import UserError
from jaxtl.evaluation import ensemble

# Three members, three classes, four examples.
MEMBERS = np.array(
    [
        [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]],
        [[0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.7, 0.2, 0.1], [0.3, 0.4, 0.3]],
        [[0.5, 0.4, 0.1], [0.0, 0.9, 0.1], [0.1, 0.0, 0.9], [0.2, 0.2, 0.6]],
    ]
)


def test_the_mean_weighs_every_member_alike():
    found = ensemble.combine(MEMBERS, "mean")
    # (0.6 + 0.1 + 0.5) / 3 = 0.4, (0.3 + 0.8 + 0.4) / 3 = 0.5, 0.3 / 3 = 0.1
    np.testing.assert_allclose(found.probabilities[0], [0.4, 0.5, 0.1])
    np.testing.assert_array_equal(found.predicted, [1, 1, 2, 2])  # third: 0.9, 1.0, 1.1; fourth: 0.9, 0.9, 1.2
    np.testing.assert_array_equal(found.ranking[1], [1, 0, 2])  # 1.0, 1.7, 0.3


def test_a_majority_wins_over_a_member_that_is_surer():
    found = ensemble.combine(MEMBERS, "vote")
    np.testing.assert_allclose(found.probabilities[:2], [[2 / 3, 1 / 3, 0], [2 / 3, 1 / 3, 0]])
    np.testing.assert_array_equal(found.predicted[:2], [0, 0])
    np.testing.assert_array_equal(ensemble.combine(MEMBERS, "mean").predicted[:2], [1, 1])


def test_equal_votes_are_decided_by_the_mean_probability_and_then_by_the_order_of_the_classes():
    found = ensemble.combine(MEMBERS, "vote")
    # One vote each. Third example: means 0.3, 0.333, 0.367. Fourth: 0.3, 0.3, 0.4.
    np.testing.assert_array_equal(found.ranking[2:], [[2, 1, 0], [2, 0, 1]])
    np.testing.assert_allclose(found.probabilities[2:], 1 / 3)


def test_one_member_answers_for_itself():
    found = ensemble.combine(MEMBERS[:1])
    np.testing.assert_array_equal(found.probabilities, MEMBERS[0])
    np.testing.assert_array_equal(found.predicted, MEMBERS[0].argmax(axis=1))


def test_no_examples_are_no_answers():
    for rule in ensemble.RULES:
        found = ensemble.combine([np.empty((0, 3))] * 2, rule)
        assert found.probabilities.shape == found.ranking.shape == (0, 3)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="is none of mean, vote"):
        ensemble.combine(MEMBERS, "median")


def test_classes_in_another_order_are_found_by_name():
    first, second = ensemble.columns([("a", ("cat", "dog", "owl")), ("b", ("owl", "cat", "dog"))])
    np.testing.assert_array_equal(first, [0, 1, 2])
    assert [("owl", "cat", "dog")[column] for column in second] == ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("cat", "dog", "fox", "elk"), "b does not know owl; a does not know fox, elk"),
        (("cat", "dog"), "(b does not know owl)"),
        (("cat", "dog", "owl", "fox"), "(a does not know fox)"),
    ],
)
def test_other_classes_are_named(other, says):
    with pytest.raises(UserError) as caught:
        ensemble.columns([("a", ("cat", "dog", "owl")), ("c", ("owl", "dog", "cat")), ("b", other)])
    assert "a and b do not tell apart the same classes" in str(caught.value)
    assert says in str(caught.value)
