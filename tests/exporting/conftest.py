"""Finished runs of every family, without the training: random parameters in a run folder as the loop writes it."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxtl import config
from jaxtl.data.tokens import load_tokenizer
from jaxtl.models import presets, stages
from jaxtl.models.vgg import VGGConfig
from jaxtl.training import checkpoint, network, setup
from jaxtl.training.network import TOKENIZER, load_run, run_params

NANO = dataclasses.replace(presets.PRESETS["vit_nano_patch2_8"], width=32, depth=2, mlp_width=128)
SMALL = {
    "deit_nano": dataclasses.replace(NANO, family="deit", classes=10),
    "vit_nano": dataclasses.replace(NANO, activation="gelu_new", norm_epsilon=1e-6),
    "dinov2_nano": dataclasses.replace(NANO, family="dinov2", norm_epsilon=1e-6, layer_scale=1.0),
    "vgg_nano": VGGConfig(blocks=((1, 8), (2, 8)), classes=10, hidden=16, image_size=8),
}


@pytest.fixture(scope="session", autouse=True)
def small_presets():
    """Every family in a size that is exported in no time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, small in SMALL.items():
            patch.setitem(presets.PRESETS, name, small)
        yield


def finish(folder, experiment, classes, tokenizer=None, weights=None, pretrained=False, shape=None):
    """Writes a finished run, all of it trained: random parameters, none of them zero or one, which hides mix-ups.

    With `pretrained`, the backbone is that of the weights. `shape` is that of the images of training.
    """
    if isinstance(experiment.data, config.Images):
        shape = shape or (experiment.model.image_size,) * 2
    net = network.network(experiment, len(classes), weights)
    random = np.random.default_rng(0)
    params = {
        path: (0.2 * random.standard_normal(leaf.shape) + path.endswith("scale")).astype(np.float32)
        for path, leaf in net.params.items()
    }
    if pretrained:
        start = network.initial_params(net, experiment.model, weights, seed=0)
        params |= {path: np.asarray(value) for path, value in start.items() if not path.startswith("head/")}
    per_class = {name: 0.8125 for name in classes}
    judged = {"accuracy": 0.8125, "loss": 0.4321}
    if classes:
        judged |= {"f1_macro": 0.7654, "precision": per_class, "recall": per_class, "f1": per_class}
    else:
        judged |= {"perplexity": 12.25}
    result = {
        "accuracy": judged["accuracy"],
        "loss": judged["loss"],
        "seconds_total": 1.0,
        "held_out": judged,
        "test": None,
        "selected_step": 2,
        "trainable_parameters": setup.count(net.params),
        "total_parameters": setup.count(net.params),
        "train_examples": 40,
        "eval_examples": 16,
        "test_examples": 0,
        "classes": list(classes),
        "image_shape": shape and list(shape),
        "architecture": dataclasses.asdict(net.config),
        "frozen_sha256": checkpoint.digest({}),
        "trained_sha256": checkpoint.digest(params),
        "steps": 2,
        "reported": {},
        "versions": {"jaxtl": "0.1.0"},
    }
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(config.to_json(experiment))
    (folder / "result.json").write_text(json.dumps(result))
    checkpoint.write(folder / checkpoint.TRAINED, params)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder / TOKENIZER))
    return folder


@pytest.fixture(scope="session")
def text_run(bert_folder, tmp_path_factory):
    """Returns what makes a finished text run of a head, once for each."""
    made = {}

    def make(kind, reads, classes=("fake", "real"), **data):
        key = (kind, reads, classes)
        if key not in made:
            head = config.Head(kind, reads, hidden=8, dropout=0.25, init="random")
            experiment = config.Experiment(
                model=config.Model("from_weights", str(bert_folder), head=head),
                data=config.Text(dir="texts", train=("train.csv",), max_length=40, **data),
                train=config.Train(precision="bfloat16", select="best"),  # exports are float32 all the same
            )
            folder = tmp_path_factory.mktemp("runs") / f"{kind}-{reads}"
            made[key] = finish(folder, experiment, classes, load_tokenizer(bert_folder), bert_folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def image_run(tmp_path_factory):
    """Returns what makes a finished image run of a preset and a head, once for each."""
    made = {}

    def make(preset, kind, reads, classes=("one", "two", "three"), size=8, shape=None, **data):
        key = (preset, kind, reads, classes, size, shape, *data.items())
        if key not in made:
            experiment = config.Experiment(
                model=config.Model(preset, image_size=size, head=config.Head(kind, reads, hidden=8, init="random")),
                data=config.Images(source="digits", **data),
            )
            made[key] = finish(tmp_path_factory.mktemp("runs") / preset, experiment, classes, shape=shape)
        return made[key]

    return make


@pytest.fixture(scope="session")
def real_run(real_weights, tmp_path_factory):
    """Returns what makes a finished run of a real checkpoint with a random head."""

    def make(name, data, reads):
        experiment = config.Experiment(
            model=config.Model("from_weights", str(real_weights / name), head=config.Head("fc", reads)), data=data
        )
        folder, tokenizer = tmp_path_factory.mktemp("runs") / name, None
        if isinstance(data, config.Text):
            tokenizer = load_tokenizer(real_weights / name)
        return finish(folder, experiment, ("fake", "real"), tokenizer, real_weights / name, pretrained=True)

    return make


@functools.cache
def _ours(folder):
    run = load_run(folder)
    train = dataclasses.replace(run.experiment.train, precision="float32")
    run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, train=train))
    net, params = run_params(run)
    # Compiled for one call: the less is done about it, the sooner it is over.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda x: stages.bind(net.structure, params)(x), compiler_options=options)


def ours(folder, inputs):
    """Returns our logits in float32, one for each class: [batch, classes]."""
    logits = np.asarray(_ours(folder)(inputs))
    return logits if logits.shape[-1] > 1 else np.concatenate([np.zeros_like(logits), logits], axis=-1)


@pytest.fixture(scope="session")
def our_logits():
    """`ours`, for the tests."""
    return ours


@pytest.fixture(scope="session")
def token_batch():
    """Texts of 12, 5 and 2 word pieces, filled up."""
    lengths = np.array([12, 5, 2], np.int32)
    ids = np.random.default_rng(1).integers(5, 50, (3, 12)).astype(np.int32)
    ids[:, 0] = 2  # [CLS]
    return stages.Sequence(ids * (np.arange(12) < lengths[:, None]).astype(np.int32), lengths)
