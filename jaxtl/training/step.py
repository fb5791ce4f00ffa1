"""The compiled steps: one of training, one of evaluation.

Frozen parameters enter beside the state. The loss is differentiated with respect to the trainable ones only, so that
nothing before the first trainable stage has a backward pass, and no activation of it is kept.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtl.models import stages

Batch = Mapping[str, jax.Array]
"""`image` uint8 [batch, height, width, 3], `label` int32 [batch], `weight` float32 [batch]: 0 for padding."""

Prepare = Callable[[jax.Array, jax.Array | None], jax.Array]
"""Raw images and a key (None: no augmentation) -> float32 images [batch, size, size, 3]."""


class TrainState(NamedTuple):
    """What a training step changes; donated to it.

    Attributes:
        step: int32 scalar, steps done.
        params: trainable parameters by path.
        opt_state: the optimiser's state, for those alone.
    """

    step: jax.Array
    params: stages.Params
    opt_state: Any

    @classmethod
    def create(cls, params: stages.Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns the state before the first step."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    structure: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    prepare: Prepare,
    frozen_stages: Collection[str],
    start: str | None = None,
) -> Callable[[TrainState, stages.Params, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Returns `step(state, frozen, batch, key) -> (state, metrics)`, jitted, the state donated.

    The key is the same for the whole run: the step number is folded in, so a resumed run draws the same dropout
    masks and augmentations. `metrics` is float32 [3]: sum of the losses, number of correct answers, number of
    examples.

    Args:
        structure: the model without its parameters.
        optimizer: for the trainable parameters.
        prepare: from a batch's images to the input of `start`.
        frozen_stages: stages that run without dropout.
        start: the first stage to run; None is the model's first.
    """

    def step(state: TrainState, frozen: stages.Params, batch: Batch, key: jax.Array):
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        inputs = prepare(batch["image"], augment_key)

        def loss_fn(trainable: stages.Params):
            model = stages.bind(structure, {**frozen, **trainable})
            logits = model(inputs, start=start, rng=dropout_key, deterministic=frozen_stages)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            total = jnp.sum(losses * batch["weight"])
            count = jnp.sum(batch["weight"])
            correct = jnp.sum((jnp.argmax(logits, axis=-1) == batch["label"]) * batch["weight"])
            return total / count, jnp.stack([total, correct, count])

        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(_exact(step), donate_argnums=0)


def forward(
    structure: nnx.GraphDef, prepare: Prepare, start: str | None = None, stop: str | None = None
) -> Callable[[stages.Params, stages.Params, jax.Array], jax.Array]:
    """Returns `step(trainable, frozen, images) -> output of stage stop`, jitted, nothing random.

    Without `stop` the output is the logits: float32 [batch, classes].
    """

    def step(trainable: stages.Params, frozen: stages.Params, images: jax.Array) -> jax.Array:
        return stages.bind(structure, {**frozen, **trainable})(prepare(images, None), start=start, stop=stop)

    return jax.jit(_exact(step))


def _exact(step: Callable) -> Callable:
    """Float32 means float32: by default TPUs, and GPUs with TF32, round float32 operands of products."""

    def wrapped(*args):
        with jax.default_matmul_precision("float32"):
            return step(*args)

    return wrapped
