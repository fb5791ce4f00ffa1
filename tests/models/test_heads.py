"""Heads: the GRU against torch, texts of different lengths in one batch, what each reader takes.

The GRU is compared with torch's in float64, for the reasons and with the tolerances of `test_vit_parity.py`: our
rounding alone, 2e-5 of the largest value and 1e-4 in gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jex

from jaxtl.models import gru, heads, kernels, presets, stages
from jaxtl.training import step
from jaxtl.weights import convert, tables

BATCH, LENGTH, INPUTS, HIDDEN = 4, 11, 24, 16
LENGTHS = np.array([11, 1, 6, 9], np.int32)


def assert_close(ours, theirs, tolerance, what):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= tolerance * largest, f"{what}: off by {error:.3g}, largest value {largest:.3g}"


def bigru(dtype=jnp.float32):
    head = heads.BiGru(
        INPUTS, hidden=HIDDEN, nodes=3, dropout=0.0, init="random", dtype=dtype, rngs=nnx.Rngs(jax.random.key(0))
    )
    return stages.Staged([("head", head)])


def recurrent_loss(structure, direction, dtype=jnp.float32):
    """The product of the last states with `direction`, and the states: of parameters, values and lengths."""

    def loss(params, values, lengths):
        head = stages.bind(structure, params).head
        states = gru.last_states(head.forward, head.backward, stages.Sequence(values, lengths), dtype)
        return jnp.sum(states * direction), states

    return loss


def test_gru_equals_torch_in_states_and_gradients():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    reference = torch.nn.GRU(INPUTS, HIDDEN, batch_first=True, bidirectional=True)
    structure, targets, _ = stages.abstract(lambda rngs: bigru())
    table = tables.gru()
    loaded = convert.read(
        table, {name: value.detach().numpy() for name, value in reference.named_parameters()}, targets, "torch"
    )
    params = {path: loaded.get(path, np.zeros(leaf.shape, np.float32)) for path, leaf in targets.items()}
    random = np.random.default_rng(0)
    values = random.standard_normal((BATCH, LENGTH, INPUTS)).astype(np.float32)
    direction = random.standard_normal((BATCH, 2 * HIDDEN))

    reference = reference.double()
    theirs = torch.from_numpy(values).double().requires_grad_()
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        theirs, torch.from_numpy(LENGTHS), batch_first=True, enforce_sorted=False
    )
    _, last = reference(packed)
    expected = last.transpose(0, 1).reshape(BATCH, -1)  # [directions, batch, hidden]
    (expected * torch.from_numpy(direction)).sum().backward()

    loss = recurrent_loss(structure, direction)
    (gradients, values_gradient), states = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, values, LENGTHS)
    assert states.dtype == jnp.float32
    assert_close(states, expected.detach(), 2e-5, "states")
    assert_close(values_gradient, theirs.grad, 1e-4, "gradient of the input")
    exact = convert.read(
        table, {name: value.grad.numpy() for name, value in reference.named_parameters()}, targets, "gradients"
    )
    assert len(exact) == 8
    for path, value in exact.items():
        assert_close(gradients[path], value, 1e-4, path)

    written = convert.write(table, params)
    assert written.keys() == dict(reference.named_parameters()).keys()
    for path, value in convert.read(table, written, targets, "written").items():
        np.testing.assert_array_equal(value, params[path], path)


def long_sequences():
    """Structure, parameters, values and lengths of a GRU over 128 time steps, and the direction of its loss.

    Its gate z is open by 3, so that it remembers, and all time steps have a part in the gradients.
    """
    structure, targets, _ = stages.abstract(lambda rngs: bigru())
    random = np.random.default_rng(0)
    params = {path: random.uniform(-(HIDDEN**-0.5), HIDDEN**-0.5, leaf.shape) for path, leaf in targets.items()}
    for direction in ("forward", "backward"):
        params[f"head/{direction}/recurrent_bias"][HIDDEN : 2 * HIDDEN] += 3
    params = {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
    values = jnp.asarray(random.standard_normal((BATCH, 128, INPUTS)), jnp.float32)
    return structure, params, values, jnp.array([128, 100, 50, 3]), random.standard_normal((BATCH, 2 * HIDDEN))


def test_gradients_of_the_gru_in_bfloat16_add_up_in_float32():
    structure, params, values, lengths, direction = long_sequences()
    exact, rounded = (
        jax.jit(jax.grad(recurrent_loss(structure, direction, dtype), has_aux=True))(params, values, lengths)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    recurrent = [path for path in exact if "recurrent" in path]
    assert len(recurrent) == 4
    for path in recurrent:
        assert rounded[path].dtype == jnp.float32
        # Operands are off by up to 2**-9 of them, at random. A sum kept in bfloat16 is off by 3e-2.
        assert_close(rounded[path], exact[path], 8e-3, path)


def test_loops_of_the_gru_hold_one_product_each():
    """That of the states with the recurrent kernel, and its transpose; the kernel's gradient is made behind them."""
    structure, params, values, lengths, direction = long_sequences()
    traced = jax.make_jaxpr(jax.grad(recurrent_loss(structure, direction), has_aux=True))(params, values, lengths)

    def loops(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["jaxpr"].jaxpr
            else:
                for inner in jex.jaxprs_in_params(equation.params):
                    yield from loops(inner)

    products = [[e.primitive.name for e in loop.eqns].count("dot_general") for loop in loops(traced.jaxpr)]
    assert products == [1, 1]


def test_gru_starts_from_torchs_uniform_distribution():
    head = bigru().head
    for direction in (head.forward, head.backward):
        for parameter in jax.tree.leaves(nnx.state(direction)):
            assert np.abs(parameter).max() <= HIDDEN**-0.5
            # The standard deviation of that distribution, within five standard errors of it over 48 values or more.
            assert abs(np.std(parameter) * (3 * HIDDEN) ** 0.5 - 1) < 5 * (0.2 / parameter.size) ** 0.5
    assert np.abs(head.forward.input_kernel[...] - head.backward.input_kernel[...]).max() > 0


@functools.cache
def whole(kind, reads, precision="float32"):
    """A BERT with a head, its parameters, none of them zero, and three texts filled up to 20 tokens."""
    inputs = stages.Sequence(jax.ShapeDtypeStruct((1, 20), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
    build = presets.model(
        dataclasses.replace(presets.PRESETS["bert_nano"], vocabulary=100),
        kind=kind,
        reads=reads,
        hidden=HIDDEN,
        dropout=0.5,
        init="zero",
        classes=2,
        inputs=inputs,
        precision=precision,
    )
    structure, targets, _ = stages.abstract(build)
    random = np.random.default_rng(0)
    params = {
        path: jnp.asarray(0.1 * random.standard_normal(leaf.shape), jnp.float32) for path, leaf in targets.items()
    }
    params |= {path: 1 + value for path, value in params.items() if path.endswith("scale")}
    ids = random.integers(0, 100, (3, 20)).astype(np.int32)
    return structure, params, stages.Sequence(jnp.asarray(ids), jnp.array([20, 7, 1], jnp.int32))


HEADS = [("fc", "cls"), ("mlp", "pooled"), ("bigru", "sequence")]


@pytest.mark.parametrize(("kind", "reads"), [("fc", "cls"), ("bigru", "sequence")])
def test_text_gives_the_same_logits_alone_and_in_a_filled_up_batch(kind, reads):
    structure, params, x = whole(kind, reads)
    run = jax.jit(lambda params, x: stages.bind(structure, params)(x))
    together = run(params, x)
    assert together.shape == (3, 1)  # two classes, one node
    assert together.dtype == jnp.float32
    for row, length in enumerate(np.asarray(x.lengths)):
        alone = run(params, stages.Sequence(x.values[row : row + 1, :length], x.lengths[row : row + 1]))
        # Products of other shapes add up in another order: a few float32 roundings of 6e-8 over two layers.
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [20, 40], ids=["three parts", "two parts of two"])
@pytest.mark.parametrize(("kind", "reads"), HEADS)
def test_forward_pass_in_parts_is_that_of_the_batch(kind, reads, tokens, monkeypatch):
    structure, params, x = whole(kind, reads)
    with kernels.plain():
        expected = step.forward(structure, step.unchanged)(params, {}, {"input": x})
    monkeypatch.setattr(kernels, "_TOKENS_OF_A_PART", tokens)
    forward = step.forward(structure, step.unchanged)
    assert ("scan" in str(jax.make_jaxpr(forward)(params, {}, {"input": x}))) == (jax.device_count() == 1)
    # Products of other shapes add up in another order.
    np.testing.assert_allclose(forward(params, {}, {"input": x}), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "reads"), HEADS)
def test_what_lies_in_the_padding_changes_no_bit_of_logits_and_gradients(kind, reads):
    structure, params, x = whole(kind, reads)

    @jax.jit
    def run(params, x):
        def loss(params):
            logits = stages.bind(structure, params)(x, rng=jax.random.key(1))
            return jnp.sum(logits * jnp.arange(1.0, 4.0)[:, None]), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = run(params, x)
    within = np.arange(20) < np.asarray(x.lengths)[:, None]
    for garbage in (0, 7, 99, 2**30):  # the last is no token at all
        others, other_logits = run(params, x._replace(values=jnp.where(within, x.values, garbage)))
        np.testing.assert_array_equal(logits, other_logits)
        for path, value in gradients.items():
            np.testing.assert_array_equal(value, others[path], path)


def test_bfloat16_stays_near_float32():
    kind, reads = "bigru", "sequence"
    logits = {}
    for precision in ("float32", "bfloat16"):
        structure, params, x = whole(kind, reads, precision)
        assert {str(value.dtype) for value in params.values()} == {"float32"}
        logits[precision] = np.asarray(jax.jit(lambda params, x, s=structure: stages.bind(s, params)(x))(params, x))
        assert logits[precision].dtype == np.float32
    # bfloat16 carries 8 bits: 4e-3 a rounding, some dozen roundings along two layers and a head.
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.05 * np.abs(logits["float32"]).max())


def test_masked_reader_gathers_the_positions_it_is_given():
    values = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
    x = stages.Sequence(values, jnp.array([4, 2]), jnp.array([[3, 0], [1, 1]], jnp.int32))
    read = heads.Features("masked")(x, None)
    np.testing.assert_array_equal(read, [[values[0, 3], values[0, 0]], [values[1, 1], values[1, 1]]])


def test_cls_reader_takes_the_first_token_of_arrays_and_of_sequences():
    values = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
    for x in (values, stages.Sequence(values, jnp.array([4, 2]))):
        np.testing.assert_array_equal(heads.Features("cls")(x, None), values[:, 0])
