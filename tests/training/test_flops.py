"""What runs cost, from shapes: against arithmetic by hand, and against XLA's own count for every experiment."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl import config, experiments
from jaxtl.data.listing import Examples, Ragged
from jaxtl.models import kernels
from jaxtl.training import explain, flops, freeze, operations
from jaxtl.training.setup import describe

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
W = jax.ShapeDtypeStruct((3, 5), jnp.float32)


def test_products_loops_and_choices_are_counted():
    product = 2 * 2 * 3 * 5
    assert operations.count(jnp.matmul, X, W) == product
    # Backward: the gradients of both operands.
    assert operations.count(jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), (0, 1)), X, W) == 3 * product
    assert operations.count(lambda x, w: jax.lax.scan(lambda c, _: (c + jnp.sum(x @ w), None), 0.0, None, 7), X, W) == (
        7 * product
    )
    chosen = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ (w.T @ w))  # noqa: E731
    assert operations.count(chosen, X, W) == 2 * product + 2 * 3 * 5 * 5 + 2 * 2 * 5 * 5 - product


@pytest.mark.parametrize("size", [5, 6])
def test_convolutions_are_counted_as_xla_does(size):
    """Backwards, convolutions are dilated and of other layouts; XLA leaves out what meets padding."""
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)

    def loss(image, kernel):
        y = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.square(y))

    function = jax.grad(loss, (0, 1))
    measured = jax.jit(function).lower(image, kernel).cost_analysis()["flops"]
    elementwise = 3 * 2 * 3 * 3 * 4  # square, its gradient, sum: of each result
    assert 0 <= measured - operations.count(function, image, kernel) <= elementwise


def published(name):
    """An experiment of its own size, without the weights."""
    chosen = experiments.load(name)
    return config.override(chosen, ["model.preset=bert_base_uncased"] if chosen.model.preset == "from_weights" else [])


def step_of(experiment):
    this = describe(experiment, None, 10 if isinstance(experiment.data, config.Images) else 2, 5_000, 1_000)
    return this, *flops.training_step(this, getattr(experiment.data, "max_length", 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "deit_cifar10",
        "deit_cifar10_lastblock",
        "vit_cifar10",
        "dinov2_cifar10",
        "vgg19_cifar10",
        "bert_covid_feature",
        "bert_bigru_covid_feature",
        "bert_covid_finetune",
        "bert_bigru_covid_finetune",
        "bert_mlm_covid",
    ],
)
def test_a_step_costs_what_is_counted(name, monkeypatch):
    """Within a tenth of XLA's count, which has norms, softmax, GELU and dropout too.

    The optimiser's update, a dozen operations for each trained parameter whatever the batch, is counted by itself. The
    step is counted as it is lowered, before XLA optimises it: compiling models of these sizes takes minutes. XLA counts
    the body of a loop once, however many turns it takes, so that here ours does too.
    """
    monkeypatch.setitem(operations._OWN, "scan", operations._inner)
    this, train_step, arguments = step_of(published(name))
    params, opt_state = arguments[0].params, arguments[0].opt_state
    update = jax.jit(this.optimizer.update).lower(params, opt_state, params).cost_analysis()["flops"]
    counted = operations.count(train_step, *arguments) + update
    with kernels.plain():  # by definition, as it is counted
        measured = train_step.lower(*arguments).cost_analysis()["flops"]
    if counted > 1e8:
        assert counted <= measured <= 1.1 * counted, measured / counted
    else:  # a dense layer on cached vectors, where the optimiser weighs as much
        assert counted <= measured


def test_run_costs_the_prefix_once_and_then_its_steps():
    """DINOv2-small at 224: 12 blocks of 12 D^2 T + 2 D T^2 multiplications, twice as many operations."""
    width, tokens, heads = 384, 257, 6
    block = 2 * (12 * width**2 * tokens + 2 * width * tokens**2)
    patches = 2 * 256 * 588 * width
    last = 2 * (12 * width**2 + 2 * heads * tokens * width)
    head = 2 * (width * 256 + 256 * 10)
    splits = [examples(64), examples(64)]
    plan = flops.of(described("dinov2_cifar10", splits), splits)
    assert plan.once == pytest.approx(128 * (patches + 11 * block), rel=1e-3)
    assert plan.evaluation == pytest.approx(64 * (last + head), rel=1e-2)
    # The block's input needs no gradient: neither do the scores of the asking token with respect to it.
    assert plan.step == pytest.approx(64 * 3 * (last + head), rel=0.15)
    assert (plan.epoch, plan.run) == (plan.step, plan.once + 4 * plan.step + 4 * plan.evaluation)


def test_texts_cost_by_the_length_of_their_batches():
    texts = Examples(Ragged(np.zeros(32 * 10, np.int32), np.arange(33) * 10), np.zeros(32, np.int32), ("a", "b"), ())
    splits = [texts, texts]
    this = described("bert_covid_finetune", splits, ["model.preset=bert_nano"])
    short, long = (dataclasses.replace(this, lengths=(length,)) for length in (16, 128))
    # Eight times the tokens, and for each eight times the attention: 16 D^2 + 4 T D operations a token.
    expected = 8 * (16 * 64**2 + 4 * 128 * 64) / (16 * 64**2 + 4 * 16 * 64)
    assert flops.of(long, splits).step / flops.of(short, splits).step == pytest.approx(expected, rel=0.1)


def described(name, splits, sets=()):
    sizes = [len(split.labels) for split in splits]
    return describe(config.override(experiments.load(name), sets), None, len(splits[0].class_names), *sizes)


def examples(count):
    names = tuple(f"class {number}" for number in range(10))
    return Examples(np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int32), names, ())


def test_explain_is_for_people_and_for_programs(capsys, tmp_path):
    chosen = config.override(experiments.load("image_folder"), ["data.source=digits", "data.dir=", "train.epochs=3"])
    chosen = dataclasses.replace(
        chosen,
        model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=32)),
        freeze=freeze.train_from("block_4"),
        data=config.Images(source="digits"),
    )
    explain.explain(chosen, tmp_path / "run", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["boundary"] == "block_3"
    assert found["plan"]["cached"]
    assert found["leading_tokens"] == 1
    assert found["stages"]["block_4"]["trained"] > 0 == found["stages"]["block_4"]["frozen"]
    assert found["flops"]["run"] < found["flops_without"]["run"]
    assert found["flops_without"]["once"] == 0
    explain.explain(chosen, tmp_path / "run")
    shown = capsys.readouterr().out
    assert "the head reads the first token: the last block computes no others" in shown
    assert "frozen stages, once" in shown
    assert not (tmp_path / "run").exists()
