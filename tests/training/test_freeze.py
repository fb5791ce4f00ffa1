"""Freeze rules: which parameters learn, exactly, and that what does not learn is left entirely alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtl import config, experiments
from jaxtl.errors import UserError
from jaxtl.training import freeze
from jaxtl.training.setup import count, describe

STAGES = ("embeddings", "block_1", "block_2", "norm", "head")
PARAMS = {
    f"{stage}/{name}": jax.ShapeDtypeStruct((2,), jnp.float32)
    for stage in STAGES
    for name in ("kernel", "bias")
    if not (stage == "norm" and name == "kernel")
}


def learning(rules):
    labels = freeze.label_params(PARAMS, rules, STAGES)
    return {path for path, label in labels.items() if label != freeze.FROZEN}


# experiment: stages that learn (first..last, or names), trained parameters, all parameters
EXPERIMENTS = {
    # block 12, final norm, both ImageNet heads, head, and the embeddings below (REFERENCE of the study: 9,630,426)
    "deit_cifar10": ({"embeddings", "block_12", "norm", "classifier", "head"}, 9_630_426, 87_338_192 + 258_826),
    "deit_cifar10_lastblock": ({"block_12", "norm", "classifier", "head"}, 8_886_234, 87_338_192 + 258_826),
    # 9,439,232 + 6,422,784 + 2,570
    "vgg19_cifar10": (
        {*(f"block5_conv{i}" for i in range(1, 5)), "head"},
        15_864_586,
        20_024_384 + 6_422_784 + 2_570,
    ),
    # a block of width D: 12 D^2 + 13 D; norm 2 D; head 256 D + 256 + 2,570
    "vit_cifar10": ({"block_12", "norm", "head"}, 7_087_872 + 1_536 + 196_864 + 2_570, 85_798_656 + 199_434),
    # LayerScale adds 2 D to each block, D = 384; we have no mask token (384), which serves pretraining only
    "dinov2_cifar10": (
        {"block_12", "norm", "head"},
        12 * 384**2 + 13 * 384 + 2 * 384 + 2 * 384 + 256 * 384 + 256 + 2_570,
        22_056_576 - 384 + 256 * 384 + 256 + 2_570,
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains_exactly_these_stages_and_parameters(name):
    stages, trained, total = EXPERIMENTS[name]
    this = describe(experiments.load(name), None, 10, 5_000, 1_000)
    params, _ = freeze.partition(this.net.params, this.labels)
    assert {path.partition("/")[0] for path in params} == stages
    assert count(params) == trained
    assert count(this.net.params) == total


@pytest.mark.parametrize(
    ("rules", "stages"),
    [
        (freeze.train_all(), set(STAGES)),
        (freeze.train_head_only(), {"head"}),
        (freeze.train_from("block_2"), {"block_2", "norm", "head"}),
        (freeze.freeze("block_1", "block_2"), {"embeddings", "norm", "head"}),
        ((("..block_1", None), ("..", "train")), {"block_2", "norm", "head"}),
        (((r"block_\d+/kernel", "matrices"), (r".*", None)), {"block_1/kernel", "block_2/kernel"}),
    ],
)
def test_rules_choose_these_stages(rules, stages):
    assert learning(rules) == {path for path in PARAMS if path.partition("/")[0] in stages or path in stages}


def test_first_matching_rule_decides_the_group():
    rules = (("head..", "head"), (r".*/bias", "biases"), (".*", None))
    labels = freeze.label_params(PARAMS, rules, STAGES)
    assert labels["head/bias"] == "head"
    assert labels["norm/bias"] == "biases"
    assert labels["block_1/kernel"] == freeze.FROZEN


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("head..", "train"),), "no rule covers embeddings/kernel"),
        ((("blok_1/.*", "train"), (".*", None)), "'blok_1/.*' matches no parameter"),
        (((".*", "train"), ("block_1/.*", None)), "decides nothing: earlier rules match all of it"),
        (((".*", None),), "nothing is left to train"),
        ((("(", "train"),), "not a regular expression"),
        ((("blok_1..", "train"), (".*", None)), "no stage 'blok_1' (did you mean 'block_1'?)"),
        ((("norm..block_1", "train"), (".*", None)), "is empty"),
        (((".*", "frozen"),), "'frozen' is taken"),
        # a regular expression must match the whole path: this one would match no parameter
        ((("block_1", "train"), (".*", None)), "'block_1' matches no parameter"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, message):
    with pytest.raises(UserError) as error:
        freeze.label_params(PARAMS, rules, STAGES)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ('train_from("block_2")', freeze.train_from("block_2")),
        ("train_head_only()", freeze.train_head_only()),
        ('[["block_1..", "train"], [".*", None]]', freeze.train_from("block_1")),
    ],
)
def test_rules_can_be_given_on_the_command_line(text, rules):
    assert freeze.parse(text) == rules


@pytest.mark.parametrize("text", ["train_form('x')", "__import__('os')", "train_from(", "1", "[['a']]", "[[1, 2]]"])
def test_text_that_is_no_rule_is_refused_and_never_run(text):
    with pytest.raises(ValueError, match="expected one of train_all"):
        freeze.parse(text)


def concrete(params):
    keys = jax.random.split(jax.random.key(0), len(params))
    return {path: jax.random.normal(key, leaf.shape) for key, (path, leaf) in zip(keys, params.items(), strict=True)}


def test_labels_are_optax_labels_and_frozen_leaves_stay_bitwise_equal_under_weight_decay():
    labels = freeze.label_params(PARAMS, freeze.train_from("block_2"), STAGES)
    params = start = concrete(PARAMS)
    optimizer = optax.multi_transform(
        {freeze.TRAIN: optax.adamw(1e-1, weight_decay=1.0), freeze.FROZEN: optax.set_to_zero()}, labels
    )
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    for path, label in labels.items():
        assert bool(jnp.all(params[path] == start[path])) == (label == freeze.FROZEN), path
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    assert len(moments) == 2 * sum(label != freeze.FROZEN for label in labels.values())


def test_mask_alone_in_optax_masked_lets_raw_gradients_through_as_the_module_warns():
    mask = freeze.trainable_mask(freeze.label_params(PARAMS, freeze.train_head_only(), STAGES))
    params = concrete(PARAMS)
    optimizer = optax.masked(optax.sgd(0.1), mask)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head/kernel"], -0.1 * gradients["head/kernel"])
    np.testing.assert_array_equal(updates["block_1/kernel"], gradients["block_1/kernel"])


def test_frozen_stages_include_those_without_parameters():
    labels = {"conv/kernel": freeze.FROZEN, "head/kernel": freeze.TRAIN}
    assert freeze.frozen_stages(labels, ("conv", "pool", "head")) == ("conv", "pool")


def test_multiplier_for_an_unknown_group_is_refused():
    from jaxtl.training import optim

    with pytest.raises(UserError, match=r"no freeze rule trains a group 'haed' \(did you mean 'head'"):
        optim.optimizer(config.Optim(multipliers=(("haed", 10.0),)), {"head/kernel": "head"}, 10)
