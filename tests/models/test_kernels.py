"""Products and attention: every way that they are computed gives the same values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxtl.models import kernels

XLA = {"implementation": "xla"}


class CudaVersions:
    """What JAX asks of the CUDA libraries."""

    def cudnn_get_version():
        return 91400


def operands(batch=6, tokens=10, heads=3, width=8, dtype=jnp.float32):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((batch, tokens, heads, width)), dtype) for _ in range(3)]


def reference(query, key, value, lengths):
    """Float64, one head of one example at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    result = np.zeros_like(query)
    for example, head in np.ndindex(query.shape[0], query.shape[2]):
        length = query.shape[1] if lengths is None else int(lengths[example])
        scores = query[example, :, head] @ key[example, :length, head].T / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[example, :, head] = weights / weights.sum(-1, keepdims=True) @ value[example, :length, head]
    return result


@pytest.mark.parametrize("lengths", [None, jnp.array([10, 1, 4, 10, 9, 2])])
@pytest.mark.parametrize("part", [1, 2, 6, 100], ids=lambda part: f"{part} at a time")
def test_attention_a_few_examples_at_a_time(monkeypatch, lengths, part):
    given = operands()
    direction = operands()[0]

    def loss(query, key, value):
        return jnp.sum(kernels.attention(query, key, value, None, lengths, 0.0) * direction)

    expected = jax.grad(loss, (0, 1, 2))(*given)
    scores = 4 * 3 * 10**2
    monkeypatch.setattr(kernels, "_SCORES_AT_ONCE", 0)
    monkeypatch.setattr(kernels, "_SCORES_OF_A_PART", part * scores)
    assert "scan" in str(jax.make_jaxpr(loss)(*given))
    np.testing.assert_allclose(
        kernels.attention(*given, None, lengths, 0.0), reference(*given, lengths), rtol=1e-5, atol=1e-5
    )
    for ours, theirs in zip(jax.grad(loss, (0, 1, 2))(*given), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # Where each of several devices has some of the examples, a loop over them would send all to each.
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert "scan" not in str(jax.make_jaxpr(lambda *given: loss(*given))(*given))  # traced anew


@pytest.mark.parametrize("lengths", [None, jnp.array([9, 1, 4, 9, 9, 2])])
@pytest.mark.parametrize("tokens", [9, 10])
def test_fused_kernel_and_its_gradients(monkeypatch, lengths, tokens):
    """cuDNN needs a GPU. JAX makes a program for one without it, having checked all that cuDNN asks for; its own
    implementation of the same function gives the values."""
    monkeypatch.setattr(kernels, "_cudnn", lambda query: True)
    given = operands(tokens=tokens)
    direction = operands(tokens=tokens)[0]

    def loss(query, key, value):
        return jnp.sum(kernels.attention(query, key, value, None, lengths, 0.0) * direction)

    low = [x.astype(jnp.bfloat16) for x in given]
    with monkeypatch.context() as patch:
        patch.setattr(fused_attention_stablehlo, "cuda_versions", CudaVersions)
        program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*low).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmhaSoftmaxBackward" in program

    theirs = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *given, **settings: theirs(*given, **{**settings, **XLA})
    )
    found = kernels.attention(*given, None, lengths, 0.0), jax.grad(loss, (0, 1, 2))(*given)
    monkeypatch.undo()
    expected = kernels.attention(*given, None, lengths, 0.0), jax.grad(loss, (0, 1, 2))(*given)
    within = np.arange(tokens) < (np.full(6, tokens) if lengths is None else np.asarray(lengths))[:, None]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours[within], theirs[within], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, jnp.array([10, 1, 4, 10, 9, 2])])
def test_on_a_gpu_the_fused_kernel_gets_what_it_needs(monkeypatch, lengths):
    """cuDNN itself needs a GPU: here JAX's own implementation of the same function stands in for it."""
    called = []
    theirs = jax.nn.dot_product_attention

    def stand_in(*arguments, implementation, **settings):
        called.append(implementation)
        return theirs(*arguments, implementation="xla", **settings)

    monkeypatch.setattr(kernels, "_cudnn", lambda query: query.dtype == jnp.bfloat16)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    given = operands(dtype=jnp.bfloat16)
    found = kernels.attention(*given, None, lengths, 0.1)  # without a key there is no dropout
    assert called == ["cudnn"]
    # bfloat16 has 8 bits: weights and values of size one are rounded by up to 2**-9 each.
    np.testing.assert_allclose(found.astype(jnp.float32), reference(*given, lengths), atol=0.03)
    kernels.attention(*given, jax.random.key(0), lengths, 0.1)
    kernels.attention(*operands(), None, lengths, 0.1)
    assert called == ["cudnn"]  # it has no dropout here, and no float32


@pytest.mark.parametrize("spec", ["brhd,chd->brhc", "brhc,chd->brhd", "bi,io->bo"])
def test_einsum_and_its_gradients(spec):
    sizes = dict(zip("brhdcio", (3, 2, 4, 5, 6, 5, 7), strict=True))
    random = np.random.default_rng(0)
    of_x, of_kernel, of_result = spec.replace("->", ",").split(",")
    x, kernel, direction = (
        jnp.asarray(random.standard_normal([sizes[index] for index in term]), jnp.float32)
        for term in (of_x, of_kernel, of_result)
    )

    def loss(x, kernel, product):
        return jnp.sum(product(spec, x, kernel) * direction)

    ours = jax.grad(loss, (0, 1))(x, kernel, lambda *given: kernels.einsum(*given, jnp.float32))
    expected = jax.grad(loss, (0, 1))(x, kernel, jnp.einsum)
    for found, gradient in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)
    low = jax.grad(loss, (0, 1))(x.astype(jnp.bfloat16), kernel, lambda *given: kernels.einsum(*given, jnp.bfloat16))
    assert low[0].dtype == jnp.bfloat16
    assert low[1].dtype == jnp.float32
    assert np.any(low[1] != low[1].astype(jnp.bfloat16))  # the kernel's gradient is not rounded
