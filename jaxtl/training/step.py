"""The compiled steps: one of training, two of evaluation.

Frozen parameters enter beside the state. The loss is differentiated with respect to the trainable ones only, so that
nothing before the first trainable stage has a backward pass, and no activation of it is kept.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtl.models import kernels, stages
from jaxtl.training.sharding import Layout

_ONE_DEVICE = Layout()

Batch = Mapping[str, Any]
"""What `jaxtl.data.loader` yields: `input`, `label` int32 [batch], `weight` float32 [batch], 0 for padding; `index`."""

Prepare = Callable[[Batch, jax.Array | None], Batch]
"""From a raw batch and a key (None: evaluation) to the batch whose `input` the model takes.

Of masked language modelling, `label` and `weight` are [batch, read] afterwards.
"""


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


def unchanged(batch: Batch, key: jax.Array | None) -> Batch:
    """The `Prepare` of what is the model's input already."""
    del key
    return batch


def train_step(
    structure: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    prepare: Prepare,
    frozen_stages: Collection[str],
    start: str | None = None,
    *,
    accumulate: int = 1,
    remat: bool = False,
    layout: Layout = _ONE_DEVICE,
) -> Callable[[TrainState, stages.Params, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Returns `step(state, frozen, batch, key) -> (state, figures)`, jitted, the state donated.

    The key is the same for the whole run: the step number is folded in, so a resumed run draws the same dropout
    masks and augmentations. `figures` are those of `score`, and two more: 1 where the loss or the norm of the gradient
    was not finite, 0 elsewhere (such a step changes nothing but the step number), and what any process asks for, see
    `Layout.put_batch`.

    Args:
        structure: the model without its parameters.
        optimizer: for the trainable parameters.
        prepare: from a raw batch to one whose input is that of `start`.
        frozen_stages: stages that run without dropout.
        start: the first stage to run; None is the model's first.
        accumulate: parts that a batch is gone through in, one after the other; the batch must divide.
        remat: see `stages.Staged`.
        layout: where state and batches lie.
    """

    loss_fn = loss(structure, frozen_stages, start, remat=remat, layout=layout)

    def gradients_of(trainable: stages.Params, frozen: stages.Params, raw: Batch, key: jax.Array):
        """Returns the gradients of the mean loss, or of the sum where parts are added up, and the figures."""
        prepare_key, dropout_key = jax.random.split(key)
        batch = prepare(raw, prepare_key)

        def objective(trainable: stages.Params):
            total, figures = loss_fn(trainable, frozen, batch, raw, dropout_key)
            return total if accumulate > 1 else total / answers(figures), figures

        return jax.grad(objective, has_aux=True)(trainable)

    def answers(figures: jax.Array) -> jax.Array:
        return jnp.maximum(figures[2], 1.0)  # of texts in which nothing can be hidden there are none

    def step(state: TrainState, frozen: stages.Params, raw: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            gradients, figures = gradients_of(state.params, frozen, raw, key)
        else:

            def add(totals, part):
                return jax.tree.map(jnp.add, totals, gradients_of(state.params, frozen, *part)), None

            parts = jax.tree.map(lambda x: _parts(x, accumulate), raw), jax.random.split(key, accumulate)
            nothing = jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(4, jnp.float32)
            (gradients, figures), _ = jax.lax.scan(add, nothing, parts)
            gradients = jax.tree.map(lambda total: total / answers(figures), gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # By the norm, whose root XLA takes once. Flags of every gradient, put together by `and`, its CPU backend puts
        # together anew in the update of every parameter, and compiles for half a minute longer.
        finite = jnp.isfinite(figures[0]) & jnp.isfinite(optax.tree.norm(gradients))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        asked = jnp.max(raw["asked"] & 1) + 2 * jnp.max(raw["asked"] >> 1) if "asked" in raw else 0
        figures = layout.gathered(jnp.append(figures, jnp.stack([jnp.where(finite, 0.0, 1.0), asked])))
        return layout.divided(TrainState(state.step + 1, params, opt_state)), figures

    return jax.jit(_exact(step), donate_argnums=0)


def loss(
    structure: nnx.GraphDef,
    frozen_stages: Collection[str],
    start: str | None = None,
    *,
    remat: bool = False,
    layout: Layout = _ONE_DEVICE,
) -> Callable[[stages.Params, stages.Params, Batch, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns `loss(trainable, frozen, batch, raw, key) -> (sum of the losses, figures)`, to be differentiated.

    `batch` is the prepared `raw`; `figures` are those of `score`; for the rest see `train_step`.
    """

    def loss_fn(trainable: stages.Params, frozen: stages.Params, batch: Batch, raw: Batch, key: jax.Array):
        model = stages.bind(structure, layout.gathered({**frozen, **trainable}))
        logits = model(batch["input"], start=start, rng=key, deterministic=frozen_stages, remat=remat)
        figures = _figures(logits, batch, raw)
        return figures[0], figures

    return loss_fn


def forward(
    structure: nnx.GraphDef,
    prepare: Prepare,
    start: str | None = None,
    stop: str | None = None,
    layout: Layout = _ONE_DEVICE,
) -> Callable[..., Any]:
    """Returns `step(trainable, frozen, batch, key=None) -> output of stage stop`, jitted.

    Nothing is random but the preparation, and that only with a key. Of the batch, `input` is enough. Without `stop` the
    output is the logits: float32 [batch, classes], or [batch, 1], and every device has all of them; of another output
    every device has its rows.
    """
    place = layout.by_rows if stop else layout.gathered

    def step(trainable: stages.Params, frozen: stages.Params, raw: Batch, key: jax.Array | None = None) -> Any:
        model = stages.bind(structure, layout.gathered({**frozen, **trainable}))
        return place(_in_parts(model, prepare(raw, key)["input"], start, stop))

    return jax.jit(_exact(step))


def score(
    structure: nnx.GraphDef, prepare: Prepare, start: str | None = None, layout: Layout = _ONE_DEVICE
) -> Callable[[stages.Params, stages.Params, Batch], jax.Array]:
    """Returns `step(trainable, frozen, batch) -> figures`, jitted, nothing random.

    `figures` is float32 [4]: sum of the losses, number of correct answers, number of answers, number of examples.
    """

    def step(trainable: stages.Params, frozen: stages.Params, raw: Batch) -> jax.Array:
        batch = prepare(raw, None)
        model = stages.bind(structure, layout.gathered({**frozen, **trainable}))
        return layout.gathered(_figures(_in_parts(model, batch["input"], start), batch, raw))

    return jax.jit(_exact(step))


def _in_parts(model: stages.Staged, x: Any, start: str | None, stop: str | None = None) -> Any:
    """Returns the output of stage `stop`, nothing random; all but the head in parts, see `kernels.in_parts`.

    The head has little to do for an example, and of a text, token by token.
    """
    *backbone, head = model.stages
    if backbone and start != head:
        until = backbone[-1] if stop in (None, head) else stop
        values = stages.values(x)
        # Of images as many as there are patches of 14 x 14 pixels.
        tokens = max(1, values.shape[1] * values.shape[2] // 196) if values.ndim == 4 else _tokens(x)
        x = kernels.in_parts(lambda part: model(part, start=start, stop=until), x, tokens)
    return model(x, start=head) if stop in (None, head) else x


def _tokens(x: stages.Sequence | jax.Array) -> int:
    """Returns the length of sequences, and of vectors 1."""
    return stages.values(x).shape[1] if isinstance(x, stages.Sequence) or x.ndim == 3 else 1


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[rows, ..] -> [count, rows / count, ..], each part every `count`-th row: of rows on several devices, from all."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _figures(logits: jax.Array, batch: Batch, raw: Batch) -> jax.Array:
    label, weight = batch["label"], batch["weight"]
    if logits.shape[-1] == 1:  # one node for two classes
        logits = logits[..., 0]
        losses = optax.sigmoid_binary_cross_entropy(logits, label)
        answers = (logits > 0).astype(label.dtype)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        answers = jnp.argmax(logits, axis=-1)
    correct = jnp.sum((answers == label) * weight)
    return jnp.stack([jnp.sum(losses * weight), correct, jnp.sum(weight), jnp.sum(raw["weight"])])


def _exact(step: Callable) -> Callable:
    """Float32 means float32: by default TPUs, and GPUs with TF32, round float32 operands of products."""

    def wrapped(*args):
        with jax.default_matmul_precision("float32"):
            return step(*args)

    return wrapped
