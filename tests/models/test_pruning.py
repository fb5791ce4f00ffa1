"""A last block that computes only what the head reads gives the same answers and gradients as one that computes all."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtl.models import kernels, layers, presets, stages

VIT = dataclasses.replace(presets.PRESETS["vit_nano_patch2_8"], qkv_bias=True)
TRANSFORMERS = {
    "vit": VIT,
    "deit": dataclasses.replace(VIT, family="deit", classes=7),
    "dinov2": dataclasses.replace(VIT, family="dinov2", layer_scale=0.3),
    "bert": dataclasses.replace(presets.PRESETS["bert_nano"], hidden_dropout=0.0, attention_dropout=0.0),
}
CASES = [("vit", "cls"), ("deit", "cls"), ("deit", "logits"), ("dinov2", "cls"), ("bert", "cls"), ("bert", "pooled")]
IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
TEXTS = stages.Sequence(jax.ShapeDtypeStruct((1, 12), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))


def build(family, reads, prune, precision="float32"):
    return presets.model(
        TRANSFORMERS[family],
        kind="mlp",
        reads=reads,
        hidden=16,
        dropout=0.0,
        init="random",
        classes=5,
        inputs=TEXTS if family == "bert" else IMAGES,
        precision=precision,
        prune=prune,
    )


def inputs(family, batch=3):
    random = np.random.default_rng(0)
    if family == "bert":
        ids = jnp.asarray(random.integers(0, 30522, (batch, 12)), jnp.int32)
        return stages.Sequence(ids, jnp.array([12, 5, 1], jnp.int32))
    return jnp.asarray(random.standard_normal((batch, 8, 8, 3)), jnp.float32)


def pair(family, reads, precision="float32"):
    """(structure, params) of the pruned model and of the whole one, with the same values, large enough to matter."""
    structures, params = [], None
    for prune in (True, False):
        structure, abstract, _ = stages.abstract(build(family, reads, prune, precision))
        structures.append(structure)
        names = tuple(abstract)
        assert params is None or tuple(params) == names
        random = np.random.default_rng(1)
        params = {
            path: jnp.asarray(random.standard_normal(leaf.shape) * 0.15 + ("scale" in path), jnp.float32)
            for path, leaf in abstract.items()
        }
    return structures, params


@pytest.mark.parametrize(("family", "reads"), CASES)
def test_same_answers_and_gradients(family, reads):
    (pruned, whole), params = pair(family, reads)
    x = inputs(family)
    direction = jnp.asarray(np.random.default_rng(2).standard_normal((3, 5)), jnp.float32)

    def loss(structure, params):
        return jnp.sum(stages.bind(structure, params)(x) * direction)

    ours, expected = (jax.jit(jax.value_and_grad(partial(loss, structure)))(params) for structure in (pruned, whole))
    # Float32 products in another order.
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    for path, gradient in expected[1].items():
        scale = float(jnp.max(jnp.abs(gradient)))
        if path.endswith("attention/key/bias"):
            # Zero by arithmetic, the softmax not depending on it; what the whole block finds is rounding.
            scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in expected[1].values())
        np.testing.assert_allclose(ours[1][path], gradient, atol=2e-5 * scale + 1e-9, err_msg=path)


def test_bfloat16_rounds_no_more_than_the_whole_block():
    (pruned, whole), params = pair("dinov2", "cls", "bfloat16")
    pruned, whole, exact = (
        jax.jit(lambda params, structure=structure: stages.bind(structure, params)(inputs("dinov2")))(params)
        for structure in (pruned, whole, pair("dinov2", "cls")[0][1])
    )
    off = [float(jnp.max(jnp.abs(answers - exact))) for answers in (pruned, whole)]
    assert off[0] < 2 * off[1] + 1e-3


@pytest.mark.parametrize(("family", "reads"), [("vit", "cls_patches"), ("vgg", "flatten"), ("bert", "sequence")])
def test_what_reads_every_token_is_not_pruned(family, reads):
    config = presets.PRESETS["vgg19"] if family == "vgg" else TRANSFORMERS[family]
    assert presets.leading(config, reads) is None


@pytest.mark.parametrize("normed", [False, True])
def test_dropout_of_the_weights_falls_on_what_keys_and_values_would_give(normed):
    """With the draws made for the few that ask, against keys and values made in full, of the normed input."""
    layer = layers.Attention(16, 2, dropout=0.4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm = layers.LayerNorm(16, epsilon=1e-6, dtype=jnp.float32)
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    for dense in (layer.key, layer.value, layer.query):
        dense.bias[...], dense.kernel[...] = normal(16), normal(16, 16)
    norm.scale[...], norm.bias[...] = normal(16), normal(16)
    x = normal(3, 6, 16)
    of = norm(x) if normed else x
    lengths, key = jnp.array([6, 3, 1]), jax.random.key(3)
    query, keys, values = (
        dense(y).reshape(3, -1, 2, 8).swapaxes(1, 2)
        for dense, y in ((layer.query, of[:, :2]), (layer.key, of), (layer.value, of))
    )
    weights = kernels.attention_weights(query @ keys.swapaxes(2, 3) / 8**0.5, key, lengths, 0.4)
    expected = layer.output((weights @ values).swapaxes(1, 2).reshape(3, 2, 16))
    found = layer(x, key, lengths, leading=2, norm=norm if normed else None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_gradient_of_every_token_is_made_where_none_is_wanted():
    """Of what enters the last block, cached; scale and bias of its first norm learn from sums over the tokens."""

    def gradients_of_tokens(prune):
        structure, params, _ = stages.abstract(build("vit", "cls", prune))
        x = jax.ShapeDtypeStruct((4, 17, 64), jnp.float32)

        def loss(params, x):
            return jnp.sum(stages.bind(structure, params)(x, start="block_4"))

        text = jax.jit(jax.grad(loss)).lower(params, x).compile().as_text()
        products = [line for line in text.splitlines() if re.search(r" (dot|custom-call|convolution)\(", line)]
        return sum(bool(re.search(r"= f32\[(4,17,64|68,64)\]", line)) for line in products)

    assert gradients_of_tokens(prune=False) > 0
    assert gradients_of_tokens(prune=True) == 0


def test_last_block_costs_a_fraction():
    """Of the block's 12 D^2 a token, all is left to the class token; of the others, their part in its attention."""

    def flops(prune):
        structure, params, _ = stages.abstract(build("vit", "cls", prune))
        batch = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)

        def last(params, x):
            model = stages.bind(structure, params)
            return model(x, start="block_4", stop="block_4")

        x = jax.eval_shape(lambda params, x: stages.bind(structure, params)(x, stop="block_3"), params, batch)
        return jax.jit(last).lower(params, x).compile().cost_analysis()["flops"]

    width, heads, tokens = 64, 4, 17
    expected = 2 * 4 * (12 * width**2 + 2 * heads * width * tokens)
    # Norms and GELU; the first norm is of every token, which weighs a quarter in a model as narrow as this.
    assert expected < flops(True) < 1.3 * expected
    assert flops(False) > 10 * flops(True)
