"""All that is known of a run before any number is computed: shapes, labels, lengths, the plan."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtl.config import Experiment
from jaxtl.data import loader, sources
from jaxtl.data.listing import Listing, Track, no_progress
from jaxtl.models import stages
from jaxtl.training import freeze, plan
from jaxtl.training.network import Network, locate, network
from jaxtl.weights.hub import is_repo_id


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, described.

    Attributes:
        weights: where the weights lie; None where they are random, or not looked for yet.
        labels: the optimiser group, or `freeze.FROZEN`, of every parameter by path.
        steps_per_epoch, steps: lengths of an epoch and of the run.
        activations: shape and dtype of one example's activations at the freeze boundary; None without one.
        plan: what is computed once.
    """

    experiment: Experiment
    weights: Path | None
    net: Network
    labels: dict[str, str]
    steps_per_epoch: int
    steps: int
    activations: jax.ShapeDtypeStruct | None
    plan: plan.Plan


def describe(
    experiment: Experiment, weights: Path | None, classes: int, train_examples: int, eval_examples: int
) -> Setup:
    """Describes the run of an experiment on data of this size. Computes nothing, needs no weights.

    Args:
        experiment: what is asked for.
        weights: where the weights lie, see `network.network`.
        classes: number of classes in the data.
        train_examples, eval_examples: sizes of the two splits.

    Raises:
        UserError: preset, weights, freeze rules or plan do not fit.
    """
    settings = experiment.train
    net = network(experiment.model, classes, settings.precision, weights)
    labels = freeze.label_params(net.params, experiment.freeze, net.stages)
    boundary = plan.boundary(labels, net.stages)
    activations = None
    if boundary:
        size = experiment.model.image_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

        def prefix(params: stages.Params, images: jax.Array) -> jax.Array:
            return stages.bind(net.structure, params)(images, stop=boundary)

        output = jax.eval_shape(prefix, net.params, images)
        activations = jax.ShapeDtypeStruct(output.shape[1:], output.dtype)
    steps_per_epoch = loader.steps_per_epoch(train_examples, settings.batch_size)
    steps = min(steps_per_epoch * settings.epochs, settings.max_steps or math.inf)
    examples, passes = train_examples + eval_examples, steps / steps_per_epoch
    decided = plan.make(experiment, boundary, activations, examples, passes)
    return Setup(experiment, weights, net, labels, steps_per_epoch, steps, activations, decided)


def look(
    experiment: Experiment, find_weights: Callable[[str], Path | None], show_progress: Track = no_progress
) -> tuple[Setup, list[Listing]]:
    """Describes the run of an experiment on its data, which is listed and drawn from but not decoded.

    Args:
        experiment: what is asked for.
        find_weights: `model.weights` -> where they lie. Called when the data has been found, as it may fetch a lot.
        show_progress: wraps the slow loops.

    Raises:
        UserError: see `describe` and `jaxtl.data.sources.listings`.
    """
    drawn = sources.listings(experiment.data, show_progress)
    weights = find_weights(experiment.model.weights)
    return describe(experiment, weights, len(drawn[0].class_names), *(len(split.labels) for split in drawn)), drawn


def preview(experiment: Experiment, *, download: bool, to_come: bool = False) -> tuple[Setup, list[Listing]]:
    """Describes a run before it is time for it: fetches no weights, and no data where `download` is False.

    What the Hub holds is fetched only where its size is asked for.

    Args:
        experiment: what is asked for.
        download: whether data may be fetched and prepared, as far as the experiment allows it.
        to_come: the weights are those of a run that is still to be made.

    Raises:
        UserError: see `look`.
    """

    def find_weights(weights: str) -> Path | None:
        here = Path(weights).expanduser().exists() or not is_repo_id(weights)
        return locate(weights) if not to_come and (here or experiment.model.preset == "from_weights") else None

    data = dataclasses.replace(experiment.data, download=download and experiment.data.download)
    return look(dataclasses.replace(experiment, data=data), find_weights)


def count(params: stages.Params) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in params.values())
