"""The network of an experiment: its architecture, stages and parameters, and the values they start from."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from jaxtl import config
from jaxtl.errors import UserError, suggest
from jaxtl.models import presets, stages
from jaxtl.training import checkpoint
from jaxtl.weights import configs, convert, files, hub, tables

HEAD = "head"  # the stage that is ours; all before it is the backbone


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without values.

    Attributes:
        config: the backbone's architecture.
        build: makes the module from random streams.
        structure: the module without its parameters.
        params: abstract parameters by path, backbone and head, in the order of the stages.
        stages: names in order, the head's last.
    """

    config: presets.Config
    build: Callable[[nnx.Rngs], stages.Staged]
    structure: nnx.GraphDef
    params: stages.Params
    stages: tuple[str, ...]


def network(model: config.Model, classes: int, precision: str, weights: Path | None) -> Network:
    """Returns the network that an experiment describes.

    Args:
        model: preset, image size and head.
        classes: number of classes to tell apart.
        precision: compute dtype, by name.
        weights: where the weights lie (see `locate`), None where they are random or not at hand. The architecture
            described beside them is used, and must be the preset's.

    Raises:
        UserError: an unknown preset, weights of another architecture, or parts that do not fit together.
    """
    architecture = _architecture(model, weights)
    try:
        build = presets.classifier(
            architecture,
            **dataclasses.asdict(model.head),
            classes=classes,
            image_size=model.image_size,
            precision=precision,
        )
    except ValueError as error:
        raise UserError(f"model.image_size={model.image_size}, model.head.reads={model.head.reads}: {error}") from None
    structure, params, names = stages.abstract(build)
    order = {name: index for index, name in enumerate(names)}
    params = dict(sorted(params.items(), key=lambda item: (order[item[0].partition("/")[0]], item[0])))
    return Network(architecture, build, structure, params, names)


def locate(weights: str) -> Path | None:
    """Returns the file or folder of the weights, fetched from the Hub where need be; None for `random`.

    Raises:
        UserError: there is no such file, folder or repository, or it cannot be reached.
    """
    if weights == "random":
        return None
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if not hub.is_repo_id(weights):
        raise UserError(f"model.weights={weights}: there is no such file or folder, and it is not a repository's name")
    try:
        return hub.fetch(weights)
    except UserError as error:
        raise UserError(f"model.weights={weights}: there is no such file or folder here, and {error}") from None


def initial_params(net: Network, model: config.Model, weights: Path | None, seed: int) -> stages.Params:
    """Returns the values that training starts from: pretrained or random backbone, fresh head.

    Args:
        net: the network.
        model: the description it was made from.
        weights: where the weights lie, None for random ones.
        seed: fixes what is random.

    Raises:
        UserError: the weights cannot be read, or are not those of this network.
    """
    key = jax.random.key(seed)
    if weights is None:
        return stages.initialize(net.build, key, net.params)
    backbone = {path: leaf for path, leaf in net.params.items() if path.partition("/")[0] != HEAD}
    if _is_run(weights):
        loaded = _of_run(weights, backbone)
    else:
        table = tables.table(net.config, with_classifier=model.head.reads == "logits")
        loaded = convert.read(table, files.Checkpoint(weights), backbone, str(weights))
    fresh = stages.initialize(net.build, key, [path for path in net.params if path not in backbone])
    return {**{path: jax.numpy.asarray(value) for path, value in loaded.items()}, **fresh}


def _architecture(model: config.Model, weights: Path | None) -> presets.Config:
    preset = None
    if model.preset != "from_weights":
        if model.preset not in presets.PRESETS:
            raise UserError(
                f"model.preset={model.preset}: there is no such preset{suggest(model.preset, presets.PRESETS)}; "
                f"there are {', '.join(presets.PRESETS)}, and from_weights"
            )
        preset = presets.PRESETS[model.preset]
    if weights is not None and _is_run(weights):
        theirs = _run_experiment(weights)
        found = _architecture(theirs.model, locate(theirs.model.weights))
    elif weights is not None and weights.is_dir():
        found = configs.read_config(weights)
    elif preset is None:
        where = f"{weights} is a single file" if weights else "there are none"
        raise UserError(f"model.preset=from_weights needs weights with a config.json beside them: {where}")
    else:
        return preset
    if preset is not None and (differing := presets.same_architecture(found, preset)):
        raise UserError(
            f"the weights in {weights} are not those of {model.preset}: {', '.join(differing)}; "
            "choose the preset they belong to, or --set model.preset=from_weights"
        )
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "experiment.json").is_file()


def _run_experiment(folder: Path) -> config.Experiment:
    path = folder / "experiment.json"
    return config.from_json(path.read_text(encoding="utf-8"), str(path))


def _of_run(folder: Path, backbone: stages.Params) -> stages.Params:
    """Returns the backbone that a run trained: what it started from, overlaid with what it saved.

    What it started from must be what it was then, by the digest in its result.
    """
    trained = checkpoint.restore(folder)
    experiment = _run_experiment(folder)
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        classes, digest = len(result["classes"]), result["frozen_sha256"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: the run there has not finished; run it first") from None
    weights = locate(experiment.model.weights)
    theirs = network(experiment.model, classes, experiment.train.precision, weights)
    frozen = {}
    if len(trained) < len(theirs.params):
        start = initial_params(theirs, experiment.model, weights, experiment.train.seed)
        frozen = {path: value for path, value in start.items() if path not in trained}
    if checkpoint.digest(frozen) != digest:
        raise UserError(
            f"{folder}: its frozen parameters came from model.weights={experiment.model.weights}, which has changed "
            "since; put the weights of then back, or run it again"
        )
    values = {path: value for path, value in {**frozen, **trained}.items() if path in backbone}
    wrong = [path for path, leaf in backbone.items() if path not in values or values[path].shape != leaf.shape]
    if wrong:
        raise UserError(f"{folder} holds a run of another model: {', '.join(wrong[:3])} do not match")
    return values
