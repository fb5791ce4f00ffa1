"""All that is known of a run before any number is computed: shapes, labels, lengths, the plan."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxtl import hosts
from jaxtl.config import RANDOM, Experiment, Images, Text
from jaxtl.data import buckets, loader, sources, tokens
from jaxtl.data.listing import Track, no_progress
from jaxtl.errors import UserError
from jaxtl.models import stages
from jaxtl.training import freeze, operations, optim, plan, sharding, step
from jaxtl.training.network import Network, locate, network, tokenizer_folder
from jaxtl.weights import hub


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, described.

    Attributes:
        weights: where the weights lie; None where they are random, or not looked for yet.
        labels: the optimiser group, or `freeze.FROZEN`, of every parameter by path.
        steps_per_epoch, steps: lengths of an epoch and of the run.
        activations: what the frozen prefix returns for one example, abstract; None without a prefix.
        plan: what is computed once.
        optimizer: of the trainable parameters.
        lengths: of the batches of text, ascending; empty for images, and where the texts are not tokenised yet.
        tokenizer: of text; None where it is not at hand yet.
        layout: of its arrays on the devices; until training begins, that of one device.
    """

    experiment: Experiment
    weights: Path | None
    net: Network
    labels: dict[str, str]
    steps_per_epoch: int
    steps: int
    activations: Any
    plan: plan.Plan
    optimizer: optax.GradientTransformation
    lengths: tuple[int, ...] = ()
    tokenizer: Any = None
    layout: sharding.Layout = sharding.Layout()

    @property
    def start(self) -> str | None:
        """The stage that training begins with where the plan can be kept to; None: the first."""
        return self.net.stages[self.net.stages.index(self.plan.boundary) + 1] if self.plan.cached else None

    @property
    def entering(self) -> Any:
        """What a batch of the training holds of one example, abstract: the model's input, or kept activations."""
        return self.activations if self.plan.cached else self.net.input

    def train_step(self, prepare: step.Prepare, start: str | None) -> Callable:
        """Returns the training step, see `step.train_step`, of batches that `prepare` makes the input of `start`."""
        settings = self.experiment.train
        return step.train_step(
            self.net.structure,
            self.optimizer,
            prepare,
            freeze.frozen_stages(self.labels, self.net.stages),
            start,
            accumulate=settings.accumulate_steps,
            remat=settings.remat == "blocks",
            layout=self.layout,
        )


def describe(
    experiment: Experiment,
    weights: Path | None,
    classes: int,
    train_examples: int,
    other_examples: int,
    *,
    token_count: int | None = None,
    lengths: tuple[int, ...] = (),
    tokenizer: Any = None,
) -> Setup:
    """Describes the run of an experiment on data of this size. Computes nothing, needs no weights.

    Args:
        experiment: what is asked for.
        weights: where the weights lie, see `network.network`.
        classes: number of classes in the data.
        train_examples, other_examples: sizes of the training split, and of the others together.
        token_count: word pieces of all texts together; None where that is not known yet: the most there can be.
        lengths, tokenizer: see `Setup`.

    Raises:
        UserError: preset, weights, freeze rules or plan do not fit.
    """
    settings = experiment.train
    net = network(experiment, classes, weights)
    labels = freeze.label_params(net.params, experiment.freeze, net.stages)
    boundary = plan.boundary(labels, net.stages)
    steps_per_epoch = loader.steps_per_epoch(train_examples, settings.batch_size)
    steps = min(steps_per_epoch * settings.epochs, settings.max_steps or math.inf)
    passes = steps / steps_per_epoch
    activations, cache_bytes, share = None, 0, 0.0
    if boundary:

        def prefix(params: stages.Params, inputs: Any) -> Any:
            return stages.bind(net.structure, params)(inputs, stop=boundary)

        activations = jax.eval_shape(prefix, net.params, net.input)
        examples = train_examples * max(plan.views(experiment, passes), 1) + other_examples
        most = examples * getattr(experiment.data, "max_length", 0)
        tokens_kept = most if token_count is None else token_count
        cache_bytes = plan.cache_bytes(activations, examples, tokens_kept, experiment.plan.cache_dtype)
        cache_bytes = -(-cache_bytes // hosts.count())
        if experiment.plan.cache == "auto":  # else nobody asks
            share = _prefix_share(net, boundary, activations)
    width = getattr(net.config, "width", None)  # a convolutional network has no single one
    optimizer = optim.optimizer(experiment.optim, freeze.trained(labels), steps, width)
    decided = plan.make(experiment, boundary, cache_bytes, passes, share)
    return Setup(
        experiment, weights, net, labels, steps_per_epoch, steps, activations, decided, optimizer, lengths, tokenizer
    )


def _prefix_share(net: Network, boundary: str, activations: Any) -> float:
    """Returns the part of a training step's operations that the stages up to the boundary take.

    Those after it count three times, forwards and for two gradients: where they are frozen in part, a little too much.
    """

    def forward(x: Any, params: stages.Params, start: str | None, stop: str | None) -> Any:
        return stages.bind(net.structure, params)(x, start=start, stop=stop)

    following = net.stages[net.stages.index(boundary) + 1]
    prefix = operations.count(functools.partial(forward, start=None, stop=boundary), net.input, net.params)
    rest = operations.count(functools.partial(forward, start=following, stop=None), activations, net.params)
    return prefix / (prefix + 3 * rest)


def look(
    experiment: Experiment, find_weights: Callable[[str], Path | None], show_progress: Track = no_progress
) -> tuple[Setup, list[Any]]:
    """Describes the run of an experiment on its data: images listed and drawn but not decoded, texts tokenised.

    Args:
        experiment: what is asked for.
        find_weights: `model.weights` -> where they lie. Called when the data has been found, as it may fetch a lot.
        show_progress: wraps the slow loops.

    Returns:
        The description, and the training and held-out examples, and those for the test where there are such.

    Raises:
        UserError: see `describe` and `jaxtl.data.sources.listings`.
    """
    drawn = sources.listings(experiment.data, show_progress)
    if not drawn[0].class_names and experiment.model.head.kind != "mlm":
        raise UserError(
            f"a head of kind {experiment.model.head.kind} learns labels, and data.label_column is empty: name the "
            "column, or --set model.head.kind=mlm --set model.head.reads=masked for masked language modelling"
        )
    sizes = [len(split.labels) for split in drawn]
    weights = find_weights(experiment.model.weights)
    known: dict[str, Any] = {}
    data = experiment.data
    # Without weights that are to be had later, there is no tokenizer yet either.
    if isinstance(data, Text) and (weights or data.tokenizer or experiment.model.weights == RANDOM):
        folder = tokenizer_folder(data, weights)
        tokenizer = tokens.load_tokenizer(folder)
        if experiment.model.head.kind == "mlm" and tokens.token_ids(tokenizer).mask is None:
            raise UserError(
                f"the tokenizer in {folder} has no mask token, which masked language modelling hides pieces with: "
                "--set data.tokenizer= one that has"
            )
        drawn = sources.tokenised(drawn, tokenizer, data.max_length, show_progress)
        known = {
            "token_count": sum(len(split.inputs.values) for split in drawn),
            "lengths": batch_lengths([split.inputs.lengths for split in drawn], data),
            "tokenizer": tokenizer,
        }
    this = describe(experiment, weights, len(drawn[0].class_names), sizes[0], sum(sizes[1:]), **known)
    if this.tokenizer is not None and len(this.tokenizer) > this.net.config.vocabulary:
        raise UserError(
            f"the tokenizer in {folder} has {len(this.tokenizer)} word pieces, the model "
            f"{this.net.config.vocabulary}: it is not the tokenizer of these weights"
        )
    return this, drawn


def batch_lengths(lengths: Sequence[np.ndarray], data: Text) -> tuple[int, ...]:
    """Returns the lengths of batches: chosen for the first split's texts, and one more where another's are longer."""
    chosen = buckets.bucket_lengths(lengths[0], data.buckets, data.max_length)
    longest = max(int(split.max()) for split in lengths)
    return chosen if longest <= chosen[-1] else (*chosen, data.max_length)


def preview(experiment: Experiment, *, download: bool) -> tuple[Setup, list[Any]]:
    """Describes a run before it is time for it: fetches no weights, and no images where `download` is False.

    Of what the Hub holds, config and tokenizer are fetched, and only where the size is asked for by `from_weights`.

    Args:
        experiment: what is asked for.
        download: whether data may be fetched and prepared, as far as the experiment allows it.

    Raises:
        UserError: see `look`.
    """

    def find_weights(weights: str) -> Path | None:
        if weights == RANDOM or Path(weights).expanduser().exists() or not hub.is_repo_id(weights):
            return locate(weights)
        return hub.fetch_description(weights) if experiment.model.preset == "from_weights" else None

    data = experiment.data
    if isinstance(data, Images):  # of the published texts, a few megabytes, is told by reading them
        data = dataclasses.replace(data, download=download and data.download)
    return look(dataclasses.replace(experiment, data=data), find_weights)


def count(params: stages.Params) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in params.values())
