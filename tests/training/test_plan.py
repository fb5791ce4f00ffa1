"""The plan: where the frozen prefix ends, and when its activations are kept."""

import jax
import jax.numpy as jnp
import pytest

from jaxtl import config
from jaxtl.errors import UserError
from jaxtl.models.stages import Sequence
from jaxtl.training import freeze, plan
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


def decide(passes=2.0, boundary="block_11", augment="none", prefix=0.5, **settings):
    chosen = config.override(experiment(**settings), [f"data.augment={augment}"])
    return plan.make(chosen, boundary, BYTES if boundary else 0, passes, prefix)


def test_activations_take_what_arithmetic_says():
    tokens = jax.ShapeDtypeStruct((1, 197, 768), jnp.bfloat16)
    assert plan.cache_bytes(tokens, 1_000, 0) == BYTES
    assert plan.cache_bytes(tokens, 1_000, 0, "float32") == 2 * BYTES
    text = Sequence(jax.ShapeDtypeStruct((1, 128, 384), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
    assert plan.cache_bytes(text, 10, 512) == 512 * 384 * 4  # no padding
    assert plan.cache_bytes(text, 10, 512, "bfloat16") == 512 * 384 * 2


@pytest.mark.parametrize(
    ("arguments", "cached", "reason"),
    [
        ({}, True, "the same activations in every epoch; 0.303 GB in memory"),
        ({"boundary": None}, False, "no frozen prefix"),
        ({"cache": "off"}, False, "plan.cache is off"),
        ({"augment": "flip"}, False, "data.augment=flip changes the input in every epoch; plan.cached_views=4 keeps"),
        ({"augment": "flip", "cached_views": 3}, True, "2 views of each training image, drawn once"),
        ({"augment": "flip", "cached_views": 3, "passes": 0.5}, False, "no example is trained on twice"),
        ({"passes": 1.0}, False, "no example is trained on twice"),
        ({"passes": 1.0, "cache": "on"}, True, "the same activations"),
        ({"cache_budget_gb": 0.3}, True, "in a memory-mapped file, being above plan.cache_budget_gb=0.3"),
        (
            {"cache_budget_gb": 0.3, "cache_disk_gb": 0.2},
            False,
            "the activations take 0.303 GB, plan.cache_budget_gb is 0.3, plan.cache_disk_gb is 0.2",
        ),
        ({"cache_disk_gb": 0.0}, True, "in memory"),  # where no file is needed
        ({"prefix": 0.09}, False, "keeping 0.303 GB of activations would save 4.5% of the operations; plan.cache=on"),
        ({"prefix": 0.09, "passes": 10.0}, True, "the same activations"),
        ({"prefix": 0.09, "cache": "on"}, True, "the same activations"),
    ],
)
def test_cache_is_used_where_it_pays_and_fits_and_says_why_not(arguments, cached, reason):
    decided = decide(**arguments)
    assert decided.cached == cached
    assert reason in decided.reason
    assert decided.mapped == (cached and "cache_budget_gb" in arguments)
    assert decided.views == (2 if cached and "cached_views" in arguments else 0)


@pytest.mark.parametrize(("wanted", "passes", "views"), [(0, 5, 0), (3, 5, 3), (5, 5, 5), (6, 5, 5), (4, 1.25, 2)])
def test_no_more_views_are_kept_than_the_run_sees(wanted, passes, views):
    chosen = config.override(experiment(cached_views=wanted), ["data.augment=flip"])
    assert plan.views(chosen, passes) == views


@pytest.mark.parametrize(
    "arguments", [{"boundary": None}, {"cache": "off"}, {"cache_budget_gb": 0, "cache_disk_gb": 0}]
)
def test_views_that_cannot_be_kept_are_refused(arguments):
    with pytest.raises(UserError, match=r"plan\.cached_views=2 is not possible: "):
        decide(augment="flip", cached_views=2, **arguments)


@pytest.mark.parametrize("data", [config.Images(), config.Text()], ids=["images", "texts"])
def test_views_of_what_is_not_augmented_are_refused(data):
    chosen = config.Experiment(config.Model("vgg19"), data, plan=config.Plan(cached_views=2))
    with pytest.raises(UserError, match=r"plan\.cached_views=2: there is nothing random to keep views of"):
        plan.make(chosen, "block_11", BYTES, 2.0, 0.5)


@pytest.mark.parametrize(("rule", "cached"), [("block1_conv2", False), ("block2_conv1", False), ("block3_conv1", True)])
def test_first_convolutions_alone_are_not_worth_the_space(rule, cached):
    settings = ["model.head.reads=flatten", "train.epochs=10"]
    chosen = config.override(experiment(), [f'freeze=train_from("{rule}")', *settings])
    decided = describe(chosen, None, 10, 100, 20).plan
    assert decided.cached == cached
    assert cached or "of activations would save" in decided.reason


def test_views_of_the_training_images_alone_are_counted():
    from jaxtl import experiments

    plain = config.override(experiments.load("deit_cifar10_lastblock"), ["data.augment=none"])
    drawn = config.override(plain, ["data.augment=flip", "plan.cached_views=3", "train.epochs=10"])
    one, three = (describe(chosen, None, 10, 5_000, 1_000).plan for chosen in (plain, drawn))
    assert three.views == 3
    assert three.cache_bytes * 6_000 == one.cache_bytes * (3 * 5_000 + 1_000)


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
