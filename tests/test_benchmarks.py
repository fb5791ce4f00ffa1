"""The comparison with peers: they do the work that jaxtl does, and what goes wrong is reported.

Each torch peer is trained in float32 from the same weights, head included, as jaxtl, without dropout and with all
examples in one batch: the order of the examples then does not matter, and the losses after the same number of steps
must agree to rounding, a mistake in schedule, clipping, decay, rates or what learns does not. Losses agree to 5e-5:
float32 sums over a few thousand terms, through a few steps.
"""

import csv
import dataclasses
import importlib
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from benchmarks import prepare, run, table, works
from benchmarks.peers import batches, recipe, score
from jaxtl import config
from jaxtl.config import Experiment, Head, Images, Model, Optim, Text, Train
from jaxtl.training import freeze

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-5
FINE_TUNING = (("head..", "head"), (".*", "backbone"))
ADAMW = Optim("adamw", 5e-4, schedule="linear", warmup=0.25, weight_decay=0.5, clip_norm=0.1)


def save_lively(model, folder):
    """Saves a random model with larger weights: its features differ from input to input, as those of a trained one do.

    Else the gradients of its head are rounding errors, which Adam makes as large as any.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-dinov2"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28)
    save_lively(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)), folder)
    return folder


@pytest.fixture(scope="module")
def lively_bert(bert_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "lively-bert"
    shutil.copytree(bert_folder, folder)
    save_lively(transformers.BertModel.from_pretrained(bert_folder), folder)
    return folder


@pytest.fixture(scope="module")
def vgg19_file(tmp_path_factory):
    from benchmarks.peers import torch_vgg

    path = tmp_path_factory.mktemp("checkpoint") / "vgg19.pth"
    torch.manual_seed(0)
    peer = torch_vgg.Classifier(images(config.RANDOM, "vgg19", "block5_conv1", "flatten"), 10)
    torch.save({f"features.{name}": value.clone() for name, value in peer.backbone.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def tweets(text_folder, tmp_path_factory):
    """Twice as many texts of one class as of the other: of equal numbers, the bias has no gradient but rounding."""
    folder = tmp_path_factory.mktemp("tweets")
    with (text_folder / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    by_label = {label: [row for row in rows if row[1] == label] for label in ("fake", "real")}
    for name, kept in (("train", slice(0, 20)), ("val", slice(20, 40))):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(
                [header, *by_label["fake"][kept], *by_label["real"][kept], *by_label["real"][60:80]]
            )
    return folder


def images(weights, preset, first, reads, **optim):
    """The digits 0 to 9, twenty of them, enlarged on the way into the model."""
    return Experiment(
        model=Model(preset, str(weights), 28 if reads == "cls" else 32, Head("mlp", reads, hidden=16, dropout=0.0)),
        data=Images(source="digits", train_size=20, eval_size=25, scale="imagenet" if reads == "cls" else "unit"),
        freeze=freeze.train_from(first),
        optim=Optim(**{"name": "adam", "learning_rate": 1e-3, **optim}),
        train=Train(epochs=3, batch_size=20, eval_batch_size=10, select="best", eval_every=2),
    )


def texts(weights, folder, kind, rules, optim, buckets=1):
    """Sixty short texts of two classes."""
    return Experiment(
        model=Model("from_weights", str(weights), head=Head(kind, "cls" if kind == "fc" else "sequence", 8, 0.0)),
        data=Text(dir=str(folder), train=("train.csv",), validation="val.csv", max_length=48, buckets=buckets),
        freeze=rules,
        optim=optim,
        train=Train(epochs=4, batch_size=60, eval_batch_size=25, select="last"),
    )


def both(experiment, tmp_path):
    """What jaxtl found, and the peer, from the same weights: their results, and the peer's model."""
    from jaxtl.training import loop
    from jaxtl.training.network import initial_params, locate
    from jaxtl.training.setup import look

    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / prepare.EXPERIMENT).write_text(config.to_json(experiment))
    prepare.prepare(prepared)
    train_set, eval_set, classes = prepare.read(prepared / prepare.EXAMPLES)
    ours = loop.train(experiment, tmp_path / "run")

    this, _ = look(experiment, locate)
    params = initial_params(this.net, experiment.model, this.weights, experiment.train.seed)
    peer_loop = importlib.import_module("benchmarks.peers.torch_loop")
    peer_loop.configure(experiment)
    model = importlib.import_module(f"benchmarks.peers.torch_{recipe.family(experiment)}").build(experiment, classes)
    model.head.load_state_dict(head_of(params))
    return ours, peer_loop.train(model, experiment, train_set, eval_set), model


def head_of(params):
    """Our head's parameters under the names that the peer gives them."""
    from jaxtl.weights import convert, tables

    head = {path: np.asarray(value) for path, value in params.items() if path.startswith("head/")}
    if "head/forward/input_kernel" in head:
        found = {f"gru.{name}": value for name, value in convert.write(tables.gru(), head).items()}
        names = {"output": "output"}
    else:
        found, names = {}, {"hidden": "0", "output": "3"} if "head/hidden/kernel" in head else {"output": "1"}
    for layer, name in names.items():
        found[f"{name}.weight"] = head[f"head/{layer}/kernel"].T
        found[f"{name}.bias"] = head[f"head/{layer}/bias"]
    return {name: torch.tensor(value) for name, value in found.items()}


def assert_same_work(ours, theirs):
    assert ours["trainable_parameters"] == theirs["trainable_parameters"]
    for name in ("loss", "train_loss"):
        assert theirs[name] == pytest.approx(ours[name], abs=TOLERANCE), name
    assert theirs["accuracy"] == pytest.approx(ours["accuracy"], abs=0.041)  # one answer may be a tie
    # Or nothing was learned that a mistake could show in.
    assert theirs["loss"] < np.log(len(ours["classes"])) - 5e-4


@pytest.mark.slow
def test_dinov2_peer_trains_as_jaxtl_does(dinov2_folder, tmp_path):
    experiment = images(dinov2_folder, "from_weights", "block_2", "cls", name="adamw", weight_decay=0.5)
    ours, theirs, model = both(experiment, tmp_path)
    assert_same_work(ours, theirs)
    assert len(theirs["evaluations"]) == 2  # after epochs 2 and 3
    start = transformers.Dinov2Model.from_pretrained(dinov2_folder).state_dict()
    changed = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, start[name])}
    assert changed
    assert all(name.startswith(("encoder.layer.1.", "layernorm.")) for name in changed)


@pytest.mark.slow
def test_vgg19_peer_trains_as_jaxtl_does(vgg19_file, tmp_path):
    ours, theirs, _ = both(images(vgg19_file, "vgg19", "block5_conv1", "flatten"), tmp_path)
    assert_same_work(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rules", "optim"),
    [
        ("fc", FINE_TUNING, ADAMW),
        ("bigru", freeze.train_head_only(), ADAMW),
    ],
    ids=["fine-tuning", "frozen, bigru"],
)
def test_text_peer_trains_as_jaxtl_does(kind, rules, optim, lively_bert, tweets, tmp_path):
    if rules == FINE_TUNING:
        optim = dataclasses.replace(optim, width=64, multipliers=(("head", 10.0),))
    else:
        optim = dataclasses.replace(optim, schedule="cosine")
    ours, theirs, model = both(texts(lively_bert, tweets, kind, rules, optim), tmp_path)
    assert_same_work(ours, theirs)
    assert model.training is False or model.backbone.training is (rules == FINE_TUNING)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("data.augment=flip", "data.augment=flip"),
        ("train.max_steps=3", "train.max_steps=3"),
        ("optim.name=sgd", "optim.name=sgd"),
        ("model.head.init=random", "model.head.init=random"),
        ('freeze=[["block_2[0-9]*/mlp/.*", "train"], [".*", None]]', "freeze everything before a stage"),
        ('optim.multipliers=(("body", 2.0),)', "optim.multipliers"),
    ],
)
def test_what_a_peer_does_not_do_is_an_error(setting, complaint):
    experiment = config.override(images("random", "dinov2_small", "block_12", "cls"), [setting])
    with pytest.raises(ValueError, match=complaint):
        recipe.family(experiment)


@pytest.mark.parametrize("name", works.WORKS)
@pytest.mark.parametrize("full", [False, True], ids=["few", "full"])
def test_peers_do_every_work_and_a_small_batch_is_never_short(name, full):
    data = {"tfds": "images", "covid": "tweets"}
    chosen = works.experiment(works.WORKS[name], full=full, weights={"bert": "here"}, data=data, assignments=[])
    assert recipe.family(chosen) in ("dinov2", "vgg", "text")
    assert chosen.data.dir == data[works.WORKS[name].data]
    if not full:
        assert chosen.data.train_size % chosen.train.batch_size == 0
        assert chosen.data.eval_size % chosen.train.eval_batch_size == 0


def test_every_text_is_in_one_batch_and_batches_are_of_like_lengths():
    lengths = np.random.default_rng(0).integers(3, 100, 1000)
    ids = np.concatenate([np.full(length, length) for length in lengths])
    split = prepare.Split(ids, np.zeros(1000, np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    rows = batches.training_rows(split, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(rows)) == list(range(1000))
    assert [len(part) for part in rows] == [32] * 31 + [8]
    assert lengths[rows[0][0]] == lengths.max()
    spread = np.mean([np.ptp(lengths[part]) for part in rows])
    assert spread < 20  # of 97 in random order
    filled, found = batches.padded(split, rows[3])
    np.testing.assert_array_equal(found, lengths[rows[3]])
    assert filled.shape == (32, found.max())
    np.testing.assert_array_equal((filled > 0).sum(1), found)


@pytest.mark.parametrize("classes", [1, 3])
def test_score_is_the_metric_of_jaxtl(classes):
    from jaxtl.evaluation import metrics

    random = np.random.default_rng(0)
    logits = random.normal(size=(50, classes)).astype(np.float32) * 5
    labels = random.integers(0, max(classes, 2), 50)
    expected = metrics.classification(logits, labels, tuple("abc"[: max(classes, 2)]))
    found = score.score(logits, labels)
    assert (found.accuracy, found.loss) == pytest.approx((expected["accuracy"], expected["loss"]))


# --- the report ------------------------------------------------------------------------------------------


def a_run(side, precision, seed, total, **more):
    figures = {
        "seconds": total - 1.0, "seconds_compile": 1.0, "seconds_total": total, "examples_per_second": 100 / total,
        "peak_memory_bytes": 2**30, "accuracy": 0.5, "loss": 1.0, "device": "cpu", "versions": {side: "1.2"},
    }  # fmt: skip
    return {"work": "vgg19", "side": side, "precision": precision, "seed": seed, **figures, **more}


REPORT = {
    "processor": "Z80, 1 of 1 cores",
    "full": False,
    "set": ["train.epochs=3"],
    "absent": {"keras": "keras_hub cannot be imported: no [such] module"},
    "works": {"vgg19": {"title": "a title", "examples": [10, 5], "epochs": 3, "random_weights": True}},
    "runs": [
        *(a_run("jaxtl", "float32", seed, total) for seed, total in enumerate((2.0, 4.0, 9.0))),
        *(a_run("torch", "float32", seed, total) for seed, total in enumerate((20.0, 10.0, 10.0))),
        a_run("jaxtl", "bfloat16", 0, 2.0),
        {"work": "vgg19", "side": "torch", "precision": "bfloat16", "seed": 0, "error": "OSError: [a] is b"},
    ],
}


def test_table_has_medians_ratios_at_the_same_precision_and_what_is_missing():
    rows = {(row["side"], row["precision"]): row for row in table.medians(REPORT["runs"])}
    assert rows["jaxtl", "float32"]["seconds_total"] == 4.0
    assert rows["torch", "float32"]["ratio"] == 2.5
    assert rows["jaxtl", "bfloat16"]["ratio"] == 1.0
    assert rows["torch", "bfloat16"]["ratio"] is None
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.show(REPORT, console)
    text = console.export_text()
    assert "torch, bfloat16, seed 0, failed: OSError: [a] is b" in text
    assert "keras was not measured: keras_hub cannot be imported: no [such] module" in text
    assert "The weights are random" in text
    assert "Z80, 1 of 1 cores" in text
    (line,) = [line for line in text.splitlines() if "torch" in line and "float32" in line]
    assert [cell.strip() for cell in line.split("│")[3:7]] == ["9.0", "1.0", "10.0", "2.50"]


def test_an_interpreter_without_a_peer_is_told():
    assert "/no/python" in run.why_not("keras", "/no/python")


@pytest.mark.slow
def test_a_comparison_goes_on_after_a_crash_and_reports_it(tmp_path, monkeypatch, capsys, lively_bert, tweets):
    chosen = texts(lively_bert, tweets, "fc", freeze.train_head_only(), ADAMW)
    monkeypatch.setattr(run, "experiment", lambda work, **_: chosen)
    monkeypatch.setattr(run, "why_not", lambda side, python: "")
    process = run._process

    def broken(python, arguments, environment):
        if "keras" in arguments:
            arguments = ["-c", "import sys; print('first', file=sys.stderr); sys.exit('the last line')"]
        process(python, arguments, environment)

    monkeypatch.setattr(run, "_process", broken)
    out = tmp_path / "figures.json"
    sides = ["--peers", "keras", "torch", "--precision", "float32"]
    assert run.main(["text_feature_fc", *sides, "--out", str(out)]) == 1
    runs = json.loads(out.read_text())["runs"]
    assert [(one["side"], one.get("error")) for one in runs] == [
        ("jaxtl", None),
        ("keras", "the last line"),
        ("torch", None),
    ]
    jaxtl, _, peer = runs
    assert peer["loss"] == pytest.approx(jaxtl["loss"], abs=TOLERANCE)
    for one in (jaxtl, peer):
        assert one["seconds_total"] == one["seconds_train"] + one["seconds_evaluate"] + one["seconds_compile"]
        assert one["peak_memory_bytes"] > 2**26
    assert "keras, float32, seed 0, failed: the last line" in capsys.readouterr().out
