"""The plan: where the frozen prefix ends, and when its activations are kept."""

import jax
import jax.numpy as jnp
import pytest

from jaxtl import config
from jaxtl.models.stages import Sequence
from jaxtl.training import cache, freeze, plan
from jaxtl.training.setup import describe

STAGES = ("conv1", "pool1", "conv2", "head")
PARAMS = {f"{stage}/kernel": jax.ShapeDtypeStruct((2,), jnp.float32) for stage in ("conv1", "conv2", "head")}


@pytest.mark.parametrize(
    ("rules", "boundary"),
    [
        (freeze.train_all(), None),
        (freeze.train_from("conv2"), "pool1"),  # a stage without parameters belongs to what is before it
        (freeze.train_head_only(), "conv2"),
        # something learns below: the frozen stage above it is not the same in every epoch
        (freeze.freeze("conv2", "conv2"), None),
        (((r"conv2/.*", None), (r"head/.*", "train"), (".*", "train")), None),
    ],
)
def test_boundary_is_the_last_of_the_leading_stages_in_which_nothing_learns(rules, boundary):
    assert plan.boundary(freeze.label_params(PARAMS, rules, STAGES), STAGES) == boundary


def experiment(**settings):
    return config.Experiment(config.Model("vgg19"), config.Images(), plan=config.Plan(**settings))


BYTES = 1_000 * 197 * 768 * 2


def decide(passes=2.0, boundary="block_11", augment="none", **settings):
    chosen = config.override(experiment(**settings), [f"data.augment={augment}"])
    return plan.make(chosen, boundary, BYTES if boundary else 0, passes)


def test_activations_take_what_arithmetic_says():
    tokens = jax.ShapeDtypeStruct((1, 197, 768), jnp.bfloat16)
    assert cache.size(tokens, 1_000, 0) == BYTES
    text = Sequence(jax.ShapeDtypeStruct((1, 128, 384), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
    assert cache.size(text, 10, 512) == 512 * 384 * 4  # no padding


@pytest.mark.parametrize(
    ("arguments", "cached", "reason"),
    [
        ({}, True, "the same activations in every epoch"),
        ({"boundary": None}, False, "no frozen prefix"),
        ({"cache": "off"}, False, "plan.cache is off"),
        ({"augment": "flip"}, False, "changes the input in every epoch"),
        ({"passes": 1.0}, False, "no example is trained on twice"),
        ({"passes": 1.0, "cache": "on"}, True, "the same activations"),
        ({"cache_budget_gb": 0.3}, False, "the activations take 0.30 GB"),
    ],
)
def test_cache_is_used_where_it_pays_and_fits_and_says_why_not(arguments, cached, reason):
    decided = decide(**arguments)
    assert decided.cached == cached
    assert reason in decided.reason


def test_study_deit_has_no_prefix_to_skip_and_the_paper_rule_has():
    from jaxtl import experiments

    plans = {
        name: describe(experiments.load(name), None, 10, 5_000, 1_000).plan
        for name in ("deit_cifar10", "deit_cifar10_lastblock", "vgg19_cifar10")
    }
    assert plans["deit_cifar10"].boundary is None
    assert plans["deit_cifar10_lastblock"].boundary == "block_11"
    assert plans["deit_cifar10_lastblock"].cache_bytes == 6_000 * 198 * 768 * 4
    assert plans["vgg19_cifar10"].boundary == "block4_pool"
    assert plans["vgg19_cifar10"].cache_bytes == 6_000 * 14 * 14 * 512 * 4
