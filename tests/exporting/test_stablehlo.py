"""Functions of jax.export: called in a process that has no jaxtl, with batches of several sizes, and compared.

Both sides are float32 on the same backend, compiled in other shapes: 1e-5 of probabilities and of logits around 1.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxtl
from jaxtl import config
from jaxtl.data import images, tokens
from jaxtl.errors import UserError
from jaxtl.exporting import stablehlo
from jaxtl.models.stages import Sequence
from jaxtl.training.network import load_run

THREE = ("fake", "joke", "real")
ORIENTATION = 0x0112  # EXIF's tag

# Calls every artifact named in calls.json on its inputs, and runs the program in each README.md.
_CALLER = """
import contextlib, io, json, os, sys
from pathlib import Path
sys.modules["jaxtl"] = sys.modules["flax"] = sys.modules["torch"] = sys.modules["transformers"] = None
import numpy as np
from jax import export
root = Path(sys.argv[1])
for name, batches in json.loads((root / "calls.json").read_text()).items():
    signature = json.loads((root / name / "signature.json").read_text())
    model = export.deserialize((root / name / signature["file"]).read_bytes())
    for batch in batches:
        arrays = np.load(root / f"{batch}.npz")
        answers = model.call(*(arrays[given["name"]] for given in signature["inputs"]))
        assert {found["name"] for found in signature["outputs"]} == answers.keys()
        np.savez(root / f"{batch}.answers.npz", **answers)
    program = (root / name / "README.md").read_text().partition("```python\\n")[2].partition("```")[0]
    os.chdir(root / name)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(program, "README.md", "exec"), {})
    (root / f"{name}.shown").write_text(shown.getvalue())
"""


def called(root, calls):
    """Runs the artifacts in a process of their own."""
    (root / "calls.json").write_text(json.dumps(calls))
    # Compiled for one call each: the less is done about it, the sooner it is over.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-c", _CALLER, str(root)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def pixels(count, size):
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)


def texts(batch, rows, length):
    return batch._replace(values=batch.values[:rows, :length], lengths=np.minimum(batch.lengths[:rows], length))


@pytest.fixture(scope="module")
def answered(text_run, image_run, our_logits, token_batch, tmp_path_factory):
    """(what the artifact answered, what we do) by the name of the batch; and the folder of it all."""
    from PIL import Image

    root = tmp_path_factory.mktemp("artifacts")
    runs = {
        "bigru": text_run("bigru", "sequence"),
        "mlm": text_run("mlm", "masked", (), label_column=""),
        "vit": image_run("vit_nano", "fc", "cls", THREE, 12, (6, 6), scale="half", resize="crop"),
    }
    calls, expected = {}, {}
    for name, run in runs.items():
        (root / name).mkdir()
        stablehlo.write(load_run(run), root / name)
        calls[name] = [f"{name}{number}" for number in range(2)]
        for number, (rows, length) in enumerate(((1, 5), (3, 12))):
            if name in ("bigru", "mlm"):
                x = texts(token_batch, rows, length)
                given = {"ids": x.values, "lengths": x.lengths}
                if name == "mlm":
                    x = x._replace(positions=np.array([[1, 0], [2, 1], [1, 1]], np.int32)[:rows])
                    given["positions"] = x.positions
            else:
                given = {"images": pixels(rows, 6)}
                x = images.preprocess(given["images"], 12, "half")
            np.savez(root / f"{name}{number}.npz", **given)
            expected[f"{name}{number}"] = our_logits(run, x)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    Image.fromarray(pixels(1, 30)[0, :20]).save(root / "vit" / "image.jpg", exif=turned)
    called(root, calls)
    return {name: (dict(np.load(root / f"{name}.answers.npz")), logits) for name, logits in expected.items()}, root


@pytest.mark.parametrize("name", ["bigru", "mlm", "vit"])
def test_artifact_answers_batches_of_any_size_as_we_do_without_jaxtl(answered, name):
    for number in range(2):
        found, logits = answered[0][f"{name}{number}"]
        assert np.abs(logits).max() > 0.1
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-5)
        if name == "mlm":
            assert found.keys() == {"logits"}
            continue
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found["probabilities"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bigru", "mlm", "vit"])
def test_program_of_the_readme_runs_without_jaxtl(answered, name):
    shown = (answered[1] / f"{name}.shown").read_text()
    classes = {"bigru": "['fake', 'real']", "vit": "['fake', 'joke', 'real']"}
    assert shown.startswith(classes.get(name, "["))
    program = (answered[1] / name / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert len(program.splitlines()) < 20


def test_program_of_the_readme_answers_a_photo_as_prediction_does(answered, image_run):
    """Upright, and as small as the images of training before it is enlarged."""
    run = image_run("vit_nano", "fc", "cls", THREE, 12, (6, 6), scale="half", resize="crop")
    (expected,) = jaxtl.load(run).predict_proba([answered[1] / "vit" / "image.jpg"])
    shown = (answered[1] / "vit.shown").read_text().rpartition("[[")[2].rstrip("]\n").split()
    assert np.ptp(expected) > 0.1
    # Pillow cuts the square out and resizes in one step here: its borders may round to another level of 255.
    np.testing.assert_allclose(np.array(shown, float), expected, rtol=0, atol=2e-3)


def test_program_of_the_readme_cuts_texts_up_as_training_did(answered, text_run):
    """It uses the tokenizers library alone."""
    from tokenizers import Tokenizer

    strings = ["garlic penguins", "two doctors said , the mask\nis out 😷", "the vaccine of the city " * 9]
    alone = Tokenizer.from_file(str(answered[1] / "bigru" / "tokenizer" / "tokenizer.json"))
    alone.enable_truncation(40)
    ids = tokens.tokenise(strings, tokens.load_tokenizer(text_run("bigru", "sequence") / "tokenizer"), 40)
    for row, string in enumerate(strings):
        assert alone.encode(string).ids == ids.padded(np.array([row]), ids.lengths[row])[0].tolist()


def test_signature_says_what_the_artifact_takes_and_gives(answered):
    signature = json.loads((answered[1] / "bigru" / "signature.json").read_text())
    assert [(given["name"], given["shape"], given["dtype"]) for given in signature["inputs"]] == [
        ("ids", ["batch", "length"], "int32"),
        ("lengths", ["batch"], "int32"),
    ]
    assert [(found["name"], found["shape"]) for found in signature["outputs"]] == [
        ("logits", ["batch", 2]),
        ("probabilities", ["batch", 2]),
    ]
    assert signature["classes"] == ["fake", "real"]
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    signature = json.loads((answered[1] / "vit" / "signature.json").read_text())
    assert [(given["shape"], given["dtype"]) for given in signature["inputs"]] == [(["batch", 6, 6, 3], "uint8")]


def test_artifact_made_beside_a_gpu_is_right_on_a_cpu(text_run, our_logits, token_batch, tmp_path, monkeypatch):
    """Kernels look at the backend when they are traced: nothing of the one that it is made on may be in it."""
    run = load_run(text_run("fc", "cls"))
    expected = our_logits(run.folder, token_batch)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        stablehlo.write(run, tmp_path)
    model = jax.export.deserialize((tmp_path / stablehlo.ARTIFACT).read_bytes())
    assert "cudnn" not in model.mlir_module()
    found = model.call(token_batch.values, token_batch.lengths)
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5)


def test_text_longer_than_trained_for_is_refused(answered):
    model = jax.export.deserialize((answered[1] / "bigru" / stablehlo.ARTIFACT).read_bytes())
    with pytest.raises(ValueError, match="shapes"):
        model.call(np.ones((2, 41), np.int32), np.ones(2, np.int32))


def test_model_that_jax_export_cannot_hold_is_told_before_it_is_tried(text_run, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "_MOST", 1000)
    with pytest.raises(UserError, match="use --format=huggingface"):
        stablehlo.write(load_run(text_run("fc", "cls")), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.weights
@pytest.mark.slow
def test_real_bert_answers_as_we_do(real_run, our_logits, tmp_path):
    run = load_run(real_run("minilm-l6", config.Text(max_length=64), "cls"))
    stablehlo.write(run, tmp_path)
    texts = ["Masks work, says a new report of the WHO.", "Drinking hot water cures the virus! " * 9, "no"]
    ids = tokens.tokenise(texts, tokens.load_tokenizer(run.folder / "tokenizer"), 64)
    batch = ids.padded(np.arange(3), 64), ids.lengths.astype(np.int32)
    found = jax.export.deserialize((tmp_path / stablehlo.ARTIFACT).read_bytes()).call(*batch)
    # Six layers of 384: some more rounding than above.
    np.testing.assert_allclose(found["logits"], our_logits(run.folder, Sequence(*batch)), rtol=0, atol=1e-4)
