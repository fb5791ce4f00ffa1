"""The compiled steps: what they compute, what they leave alone, and what they do not compute at all."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl import config, experiments
from jaxtl.models import kernels, stages
from jaxtl.training import freeze, optim, step
from jaxtl.training.network import initial_params
from jaxtl.training.setup import describe

SIZE, WIDTH, DEPTH, TOKENS, CLASSES, BATCH = 8, 64, 4, 17, 10, 4


def nano(rules, prune=True, **optimizer):
    return config.Experiment(
        model=config.Model("vit_nano_patch2_8", image_size=SIZE, head=config.Head("mlp", "cls", hidden=32)),
        data=config.Images(source="digits"),
        freeze=rules,
        optim=config.Optim(**optimizer),
        plan=config.Plan(prune=prune),
    )


def prepare(batch, key):
    del key
    return {**batch, "input": batch["input"].astype(jnp.float32) / 255}


def make(experiment, start=None, **settings):
    this = describe(experiment, None, CLASSES, 64, 64)
    params = initial_params(this.net, experiment.model, None, 0)
    # The head starts from zero, so that nothing would reach what is below it.
    params["head/output/kernel"] += 0.1 * jax.random.normal(jax.random.key(1), params["head/output/kernel"].shape)
    params, frozen = freeze.partition(params, this.labels)
    optimizer = optim.optimizer(experiment.optim, freeze.trained(this.labels), 10)
    resting = freeze.frozen_stages(this.labels, this.net.stages)
    train_step = step.train_step(this.net.structure, optimizer, prepare, resting, start, **settings)
    return this, train_step, step.TrainState.create(params, optimizer), frozen


def batch(seed=0):
    random = np.random.default_rng(seed)
    return {
        "input": jnp.asarray(random.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)),
        "label": jnp.asarray(random.integers(0, CLASSES, BATCH), jnp.int32),
        "weight": jnp.ones(BATCH, jnp.float32),
    }


def test_frozen_leaves_are_neither_returned_nor_in_the_optimizer_state_under_decay_and_clipping():
    experiment = nano(freeze.train_from("block_4"), name="adamw", weight_decay=0.5, clip_norm=1.0, learning_rate=1e-2)
    _, train_step, state, frozen = make(experiment)
    started = {path: np.asarray(value) for path, value in state.params.items()}
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert moments <= {value.shape for value in started.values()}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * sum(
        value.size for value in started.values()
    )
    for seed in range(5):
        state, _ = train_step(state, frozen, batch(seed), jax.random.key(0))
    assert not state.params.keys() & frozen.keys()
    for path, value in started.items():
        # Where only the head's token asks, the key's bias has no part in the result: softmax takes it away.
        same = path == "block_4/attention/key/bias"
        assert np.array_equal(np.asarray(state.params[path]), value) == same, path


def test_clipping_looks_at_trainable_gradients_only():
    """The update of a clipped run is the gradient scaled by the norm over what learns: frozen leaves add nothing."""
    experiment = nano(freeze.train_head_only(), name="sgd", learning_rate=1.0, clip_norm=1e-3)
    _, train_step, state, frozen = make(experiment)
    before = {path: np.asarray(value) for path, value in state.params.items()}
    state, _ = train_step(state, frozen, batch(), jax.random.key(0))
    moved = math.sqrt(sum(np.sum((np.asarray(state.params[path]) - value) ** 2) for path, value in before.items()))
    # Nesterov's first step is 1.9 times the gradient; the parameters of order 0.1 round the difference at 1e-8.
    assert moved == pytest.approx(1.9e-3, rel=1e-3)


def test_padding_rows_change_neither_loss_nor_gradient():
    experiment = nano(freeze.train_all(), name="sgd", learning_rate=0.1)
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, head=config.Head("fc", "cls", dropout=0.0))
    )
    padded = batch()
    padded = {**padded, "weight": jnp.array([1.0, 1.0, 0.0, 0.0])}
    garbage = {**padded, "input": padded["input"].at[2:].set(255), "label": padded["label"].at[2:].set(0)}
    results = []
    for data in (padded, garbage):
        _, train_step, state, frozen = make(experiment)
        state, metrics = train_step(state, frozen, data, jax.random.key(0))
        results.append((state.params, metrics))
    assert float(results[0][1][2]) == 2
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_same_key_and_step_draw_the_same_dropout_and_the_next_step_another():
    experiment = nano(freeze.train_head_only(), name="sgd", learning_rate=1e-30)
    losses = []
    for _ in range(2):
        _, train_step, state, frozen = make(experiment)
        for _ in range(2):
            state, metrics = train_step(state, frozen, batch(), jax.random.key(0))
            losses.append(float(metrics[0]))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_labels_of_group_and_multiplier_scale_the_update_of_that_group_alone():
    rules = (("head..", "head"), (".*", "body"))
    moved = {}
    for factor in (1.0, 10.0):
        experiment = nano(rules, name="sgd", learning_rate=1e-3, multipliers=(("head", factor),))
        _, train_step, state, frozen = make(experiment)
        before = {path: np.asarray(value) for path, value in state.params.items()}
        state, _ = train_step(state, frozen, batch(), jax.random.key(0))
        moved[factor] = {path: np.asarray(state.params[path]) - value for path, value in before.items()}
    np.testing.assert_allclose(moved[10.0]["head/output/bias"], 10 * moved[1.0]["head/output/bias"], rtol=1e-5)
    np.testing.assert_array_equal(moved[10.0]["norm/bias"], moved[1.0]["norm/bias"])


def test_whether_all_is_finite_is_worked_out_once_and_not_in_the_update_of_every_parameter():
    _, train_step, state, frozen = make(nano(freeze.train_all(), name="adamw", clip_norm=1.0))
    program = train_step.lower(state, frozen, batch(), jax.random.key(0)).compile().as_text()
    # One flag by `and` in each of the three updates (two moments, the parameter) would be three times the square.
    assert program.count(" and(") < len(state.params) ** 2


def flops(lowered):
    return lowered.compile().cost_analysis()["flops"]


def test_frozen_prefix_has_no_backward_pass():
    """FLOPs of a step against the arithmetic, which has one forward pass of the frozen blocks and nothing else of them.

    A product of [n, a] and [a, b] takes 2 n a b operations. A block of width D on T tokens: 12 D^2 T for the dense
    layers and 2 D T^2 for the attention, both times 2 and the batch. Backward, a block takes twice its forward pass,
    less nothing, since its input too needs a gradient in all but the first trained one.
    """
    dense = 2 * BATCH * TOKENS * 12 * WIDTH**2
    attention = 2 * BATCH * 2 * TOKENS**2 * WIDTH
    block = dense + attention
    patches = 2 * BATCH * (TOKENS - 1) * 12 * WIDTH
    head = 2 * BATCH * (WIDTH * 32 + 32 * CLASSES)
    # The first trained block needs the gradients of its kernels, but the dense layers that read the norm of its input
    # (query, key, value) hand nothing further down.
    saved = 2 * BATCH * TOKENS * 3 * WIDTH**2
    expected = {
        "train_all": patches + DEPTH * 3 * block + 3 * head + patches,
        "block_4": patches + DEPTH * block + 2 * block - saved + 3 * head,
        "head": patches + DEPTH * block + 2 * head + 2 * BATCH * 32 * CLASSES,
    }
    for name, rules in {
        "train_all": freeze.train_all(),
        "block_4": freeze.train_from("block_4"),
        "head": freeze.train_head_only(),
    }.items():
        _, train_step, state, frozen = make(nano(rules, prune=False))
        measured = flops(train_step.lower(state, frozen, batch(), jax.random.key(0)))
        # Norms, softmax, GELU and Adam are not in the arithmetic; on this small model they weigh up to a fifth.
        assert expected[name] < measured < 1.25 * expected[name], (name, measured, expected[name])


@pytest.mark.slow
def test_last_block_step_of_dinov2_costs_one_forward_pass_and_little_else():
    experiment = experiments.load("dinov2_cifar10")
    size = experiment.model.image_size
    this = describe(experiment, None, CLASSES, 64, 64)
    train_step = step.train_step(
        this.net.structure, this.optimizer, step.unchanged, freeze.frozen_stages(this.labels, this.net.stages)
    )
    params, frozen = freeze.partition(this.net.params, this.labels)
    state = jax.eval_shape(lambda params: step.TrainState.create(params, this.optimizer), params)
    abstract = {
        "input": jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((BATCH,), jnp.float32),
    }
    width, tokens, heads = 384, 257, 6
    block = 2 * BATCH * (12 * width**2 * tokens + 2 * width * tokens**2)
    patches = 2 * BATCH * 256 * 588 * width
    # The last block: all twelve D^2 for the class token alone, and its heads' scores and mixtures of all tokens; three
    # times, for backward takes twice what forward does.
    last = 3 * 2 * BATCH * (12 * width**2 + 2 * heads * tokens * width)
    expected = patches + 11 * block + last
    measured = flops(train_step.lower(state, frozen, abstract, jax.random.key(0)))
    # Norms, softmax, GELU and interpolated positions add 4 %. A backward pass of the prefix would add 150 %, all tokens
    # of the last block 20 %.
    assert expected < measured < 1.1 * expected, measured / expected


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"remat": True}])
def test_parts_of_a_batch_and_values_computed_again_make_the_same_step(settings):
    """Float32 sums in another order: figures within a few roundings. Adam would turn those of tiny gradients into
    steps of any sign, so that plain gradient descent shows what the gradients are."""
    experiment = nano(freeze.train_from("block_3"), name="sgd", learning_rate=0.1)
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, head=config.Head("mlp", "cls", 32, dropout=0.0))
    )
    given = {**batch(), "weight": jnp.array([1.0, 1.0, 1.0, 0.0])}  # parts of different weight
    results = []
    for chosen in ({}, settings):
        _, train_step, state, frozen = make(experiment, **chosen)
        for _ in range(3):
            state, figures = train_step(state, frozen, given, jax.random.key(0))
        results.append((state.params, figures))
    for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


def test_every_part_of_a_batch_draws_its_own_dropout():
    """Of a hidden unit that is dropped, the output layer's kernel gets no gradient. Dropped in every one of four parts
    are 2 of 32 units on average, if each draws its own; 16 if all draw the same."""

    def untouched(accumulate):
        _, train_step, state, frozen = make(
            nano(freeze.train_head_only(), name="sgd", learning_rate=1.0), accumulate=accumulate
        )
        before = np.asarray(state.params["head/output/kernel"])
        state, _ = train_step(state, frozen, same if accumulate > 1 else one, jax.random.key(0))
        return np.sum(np.all(np.asarray(state.params["head/output/kernel"]) == before, axis=1))

    one = jax.tree.map(lambda x: x[:1], batch())
    same = jax.tree.map(lambda x: jnp.broadcast_to(x, (BATCH, *x.shape[1:])), one)
    assert untouched(1) > 8  # and units that ReLU stops
    assert untouched(BATCH) < untouched(1) - 4


@pytest.mark.slow
def test_batch_in_parts_takes_less_memory():
    def temporary(accumulate):
        _, train_step, state, frozen = make(nano(freeze.train_all(), prune=False), accumulate=accumulate)
        many = jax.tree.map(lambda x: jnp.concatenate([x] * 16), batch())
        return train_step.lower(state, frozen, many, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4) < 0.5 * temporary(1)


def test_values_computed_again_are_not_kept():
    """What the forward pass hands to the backward one. Of the compiled step's memory this shows on GPU and TPU: the CPU
    backend (jax 0.10.2) computes again what it is told to, but so early that all of it is in memory at once."""
    this, *_ = make(nano(freeze.train_all(), prune=False))

    def kept(remat):
        def run(params, x):
            model = stages.bind(this.net.structure, params)
            return model(x, stop="block_4", remat=remat)

        x = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
        saved = jax.eval_shape(lambda params, x: jax.vjp(run, params, x)[1], this.net.params, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))

    params = sum(math.prod(leaf.shape) * 4 for leaf in this.net.params.values())
    activations = BATCH * TOKENS * WIDTH * 4
    # The image and the input of each block, beside the parameters themselves.
    assert kept(True) <= params + (DEPTH + 1) * activations
    assert kept(False) > params + DEPTH * 8 * activations


def test_no_activation_of_the_frozen_prefix_is_kept_for_a_backward_pass():
    """Temporary memory of a head-only step does not grow with the number of frozen blocks run before it."""

    def temporary(rules):
        _, train_step, state, frozen = make(nano(rules, prune=False))
        return (
            train_step.lower(state, frozen, batch(), jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes
        )

    activations = BATCH * TOKENS * WIDTH * 4
    # Training everything keeps at least 8 activations of width D a block (norms, query, key, value, attention, MLP).
    assert temporary(freeze.train_all()) - temporary(freeze.train_head_only()) > DEPTH * 8 * activations


def test_images_forward_in_parts_are_those_of_the_batch(monkeypatch):
    this, _, state, frozen = make(nano(freeze.train_all()))
    stops = ("block_2", None)
    with kernels.plain():
        expected = [
            step.forward(this.net.structure, prepare, stop=stop)(state.params, frozen, batch()) for stop in stops
        ]
    monkeypatch.setattr(kernels, "_TOKENS_OF_A_PART", 3)  # images of 8 x 8 pixels have one: parts of 2 of the 4
    for stop, whole in zip(stops, expected, strict=True):
        found = step.forward(this.net.structure, prepare, stop=stop)(state.params, frozen, batch())
        assert found.shape == whole.shape
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
