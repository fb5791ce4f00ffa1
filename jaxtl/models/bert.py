"""BERT (Devlin et al. 2018, arXiv:1810.04805): a post-norm transformer encoder of text.

Stages: `embeddings, layer_1 .. layer_N` and, where a pretrained top is kept, `pooler` or `mlm`. They take and return a
`Sequence`; a top reduces it to an array. Every text is one segment: token type 0 throughout.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl.models import kernels, layers
from jaxtl.models.stages import Sequence, Staged, values


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Architecture and size.

    Attributes:
        vocabulary: number of tokens.
        positions: the longest text, in tokens.
        token_types: segments the checkpoint tells apart; only the first is used.
        hidden_dropout, attention_dropout: rates; 0.1 in all published checkpoints.
    """

    family: Literal["bert"]
    vocabulary: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    positions: int = 512
    token_types: int = 2
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1


def bert(
    config: BertConfig, *, top: str | None, leading: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Staged:
    """Builds the backbone: token ids (a Sequence) -> a Sequence of [batch, length, width], or what the top makes of it.

    Args:
        config: architecture and size.
        top: `pooler`, `mlm` or None.
        leading: the last layer returns an array of only so many of the leading tokens, for what comes after reads no
            others; None: a Sequence of all.
        dtype: compute dtype.
        rngs: random streams for the initial values.
    """
    embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
    blocks = [
        (f"layer_{i + 1}", Layer(config, leading if i + 1 == config.depth else None, dtype=dtype, rngs=rngs))
        for i in range(config.depth)
    ]
    stages = [("embeddings", embeddings), *blocks]
    if top == "pooler":
        stages.append((top, Pooler(config, dtype=dtype, rngs=rngs)))
    if top == "mlm":
        stages.append((top, MaskedLanguageModel(config, embeddings.word, dtype=dtype, rngs=rngs)))
    return Staged(stages)


def _norm(config: BertConfig, dtype: jnp.dtype) -> layers.LayerNorm:
    return layers.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype)


class Embeddings(nnx.Module):
    """Words, positions and token type 0, normalised: ids int32 [batch, length] -> [batch, length, width]."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Param:
            return nnx.Param(layers.trunc_normal(rngs.params(), (rows, config.width), jnp.float32))

        self.word = table(config.vocabulary)
        self.position = table(config.positions)
        self.token_type = table(config.token_types)
        self.norm = _norm(config, dtype)
        self.rate = config.hidden_dropout

    def __call__(self, x: Sequence, rng: jax.Array | None) -> Sequence:
        length = x.values.shape[1]
        # Clipped: by default an id outside the vocabulary would give NaN, which attention spreads even from padding.
        y = jnp.take(self.word[...], x.values, axis=0, mode="clip")
        y = self.norm(y + self.position[:length] + self.token_type[0])
        return x._replace(values=kernels.dropout(y, self.rate, rng))


class Layer(nnx.Module):
    """Post-norm transformer block: [batch, length, width] -> the same, or an array of the `leading` tokens of it."""

    def __init__(self, config: BertConfig, leading: int | None = None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = layers.Attention(
            config.width, config.heads, dropout=config.attention_dropout, dtype=dtype, rngs=rngs
        )
        self.norm1 = _norm(config, dtype)
        self.mlp = layers.Mlp(config.width, config.mlp_width, activation=config.activation, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(config, dtype)
        self.rate = config.hidden_dropout
        self.leading = leading

    def __call__(self, x: Sequence, rng: jax.Array | None) -> Sequence | jax.Array:
        attention_rng, rng1, rng2 = layers.split(rng, 3)
        y = self.attention(x.values, attention_rng, x.lengths, self.leading)
        y = self.norm1(x.values[:, : self.leading] + kernels.dropout(y, self.rate, rng1))
        y = self.norm2(y + kernels.dropout(self.mlp(y), self.rate, rng2))
        return x._replace(values=y) if self.leading is None else y


class Pooler(nnx.Module):
    """The class token through a dense layer and tanh: a Sequence, or [batch, 1.., width], -> [batch, width]."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = layers.Dense(config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Sequence | jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        return jnp.tanh(self.dense(values(x)[:, 0]))


class MaskedLanguageModel(nnx.Module):
    """Logits over the vocabulary: [..., width], or a Sequence, -> [..., vocabulary] float32.

    The decoder's kernel is the embedding of words itself: one parameter, and its gradient is the sum over both uses.
    """

    def __init__(self, config: BertConfig, word: nnx.Param, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = layers.Dense(config.width, config.width, dtype=dtype, rngs=rngs)
        self.norm = _norm(config, dtype)
        self.bias = nnx.Param(jnp.zeros(config.vocabulary, jnp.float32))
        self.word = word
        self.activation = layers.ACTIVATIONS[config.activation]
        self.dtype = dtype

    def __call__(self, x: Sequence | jax.Array, rng: jax.Array | None) -> jax.Array:
        del rng
        y = self.norm(self.activation(self.dense(values(x))))
        return kernels.matmul(y, self.word[...], None, self.dtype, 1) + self.bias[...]
