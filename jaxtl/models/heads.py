"""Heads: what reads the backbone and gives logits [batch, classes] in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtl.models import layers

# What a head may read, from the output of the backbone's last stage.
READERS = {
    "cls": lambda x: x[:, 0],
    "cls_patches": lambda x: jnp.concatenate([x[:, 0], x[:, 1:].mean(axis=1)], axis=-1),
    "logits": lambda x: x,
    "flatten": lambda x: x.reshape(x.shape[0], -1),
}

_OUTPUT_INIT = {"zero": nnx.initializers.zeros_init(), "random": nnx.initializers.glorot_uniform()}


class Head(nnx.Module):
    """`fc`: dropout, dense. `mlp`: dense, ReLU, dropout, dense.

    The output layer starts from zero, as in ViT's fine-tuning (Dosovitskiy et al. 2020, 3.2): a pretrained backbone's
    features are large, and a random layer on them would begin by being confidently wrong. With `init="random"` it
    starts from Glorot's uniform distribution, for a backbone that is trained from scratch. The hidden layer starts from
    the uniform distribution between +-1 / sqrt(inputs) (LeCun et al. 1998), as torch's Linear does.
    """

    def __init__(
        self,
        kind: str,
        reads: str,
        *,
        inputs: int,
        hidden: int,
        classes: int,
        dropout: float,
        init: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if kind == "mlp":
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            self.hidden = layers.Dense(inputs, hidden, init=uniform, dtype=dtype, rngs=rngs)
            inputs = hidden
        self.output = layers.Dense(inputs, classes, init=_OUTPUT_INIT[init], dtype=dtype, rngs=rngs)
        self.kind, self.reads, self.dropout = kind, reads, dropout

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        x = READERS[self.reads](x)
        if self.kind == "mlp":
            x = jax.nn.relu(self.hidden(x))
        return self.output(layers.dropout(x, self.dropout, rng)).astype(jnp.float32)
