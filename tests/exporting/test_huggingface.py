"""Folders for transformers: loaded by transformers and torch, compared in logits, and loaded by jaxtl again.

Both sides compute in float32, in another order: products of up to 64 numbers carry a relative error of some 1e-6, and
two or four layers add up to a few times that. 1e-4 of logits around 1 leaves room for that and for nothing else.
"""

import ast
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxtl
from jaxtl import config
from jaxtl.data import images, tokens
from jaxtl.exporting import equivalent, huggingface
from jaxtl.models import presets
from jaxtl.models.stages import Sequence
from jaxtl.training.network import load_run
from jaxtl.weights import configs, convert, tables
from jaxtl.weights.files import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
THREE = ("fake", "joke", "real")
TEXTS = {
    "BertForSequenceClassification, the [CLS] vector": ("fc", "cls"),
    "BertForSequenceClassification, the pooler, three classes": ("fc", "pooled", THREE),
    "BertForMaskedLM": ("mlm", "masked", ()),
    "BertModel and a GRU": ("bigru", "sequence"),
    "BertModel and a hidden layer on the pooler": ("mlp", "pooled", THREE),
}
IMAGES = {
    "ViTForImageClassification, other image size": ("vit_nano", "fc", "cls", THREE, 12),
    "DeiTForImageClassification": ("deit_nano", "fc", "cls", ("no", "yes")),
    "Dinov2ForImageClassification, class token, other image size": ("dinov2_nano", "fc", "cls", ("no", "yes"), 12),
    "Dinov2ForImageClassification, patches too": ("dinov2_nano", "fc", "cls_patches"),
    "ViTModel and patches too": ("vit_nano", "fc", "cls_patches"),
    "DeiTForImageClassificationWithTeacher and a hidden layer": ("deit_nano", "mlp", "logits", THREE, 12),
    "Dinov2Model and a hidden layer": ("dinov2_nano", "mlp", "cls"),
    "VGG19 and a hidden layer": ("vgg_nano", "mlp", "flatten"),
    "VGG19 with its classifier and a linear layer": ("vgg_nano", "fc", "logits"),
}
AUTO = {
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForMaskedLM": transformers.AutoModelForMaskedLM,
    "ForImageClassification": transformers.AutoModelForImageClassification,
}


def exported(run, folder):
    folder.mkdir(exist_ok=True)
    huggingface.write(load_run(run), folder)
    return folder


def module(folder):
    """What the folder's own modeling_jaxtl.py makes of it."""
    spec = importlib.util.spec_from_file_location("modeling_jaxtl", folder / "modeling_jaxtl.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found.load(folder)


def loaded(name, folder):
    """The model as its users load it; none of its parameters may come from anywhere else than the folder."""
    if " and " in name:
        return module(folder)
    auto = next(auto for suffix, auto in AUTO.items() if suffix in name)
    model, told = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == name.partition(",")[0]
    assert not any(told.values()), told
    return model.eval()


def answers(model, **inputs):
    with torch.no_grad():
        found = model(**{name: torch.from_numpy(np.array(value)) for name, value in inputs.items()})
    return np.asarray(found if torch.is_tensor(found) else found.logits)


def assert_backbone_comes_back(run, folder):
    """model.weights=FOLDER gives the run's own backbone, bit for bit."""
    finished = load_run(run)
    params, reads = finished.trained, finished.experiment.model.head.reads
    architecture = config.decode(finished.result["architecture"], presets.Config)
    read = configs.read_config(folder)
    if not (resized := read.family in ("vit", "deit") and read.image_size != architecture.image_size):
        assert not presets.same_architecture(read, architecture)
    backbone = {path: value for path, value in params.items() if not path.startswith("head/")}
    if resized:
        path = "embeddings/position"
        backbone[path] = np.zeros((1, read.grid**2 + read.special_tokens, read.width), np.float32)
    loaded = convert.read(tables.table(read, top=presets.top(reads)), Checkpoint(folder), backbone, "the export")
    assert loaded.keys() == backbone.keys()
    for path, value in loaded.items():
        if not (resized and path == "embeddings/position"):
            np.testing.assert_array_equal(value, params[path], path)


@pytest.mark.parametrize("name", TEXTS)
def test_text_model_gives_our_logits_in_torch_and_its_weights_come_back(
    name, text_run, our_logits, token_batch, tmp_path
):
    kind, reads, *classes = TEXTS[name]
    data = {"label_column": ""} if kind == "mlm" else {}
    run = text_run(kind, reads, *classes, **data)
    model = loaded(name, exported(run, tmp_path))
    batch, positions = token_batch, np.array([[1, 3], [2, 1], [1, 0]], np.int32)
    expected = our_logits(run, batch._replace(positions=positions) if kind == "mlm" else batch)
    mask = (np.arange(12) < batch.lengths[:, None]).astype(np.int64)
    found = answers(model, input_ids=batch.values.astype(np.int64), attention_mask=mask)
    if kind == "mlm":
        found = np.take_along_axis(found, positions[..., None], axis=1)
    assert np.abs(expected).max() > 0.1  # or anything would do
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    if (kind, reads) != ("fc", "cls"):  # whose pooler is no pretrained one
        assert_backbone_comes_back(run, tmp_path)


@pytest.mark.parametrize("name", IMAGES)
def test_image_model_gives_our_logits_in_torch_and_its_weights_come_back(name, image_run, our_logits, tmp_path):
    preset, kind, reads, *rest = IMAGES[name]
    run = image_run(preset, kind, reads, *rest)
    size = rest[1] if len(rest) > 1 else 8
    model = loaded(name, exported(run, tmp_path))
    pixels = np.random.default_rng(1).standard_normal((3, size, size, 3)).astype(np.float32)
    expected = our_logits(run, jnp.asarray(pixels))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        answers(model, pixel_values=pixels.transpose(0, 3, 1, 2)), expected, rtol=0, atol=TOLERANCE
    )
    if preset != "vgg_nano":  # whose config.json can name VGG19 itself alone
        assert_backbone_comes_back(run, tmp_path)


def test_transparent_pooler_stays_transparent_for_large_vectors():
    """The last layer norm can put out no more than sqrt(width) * scale + bias: a trained one has large coordinates."""
    random = np.random.default_rng(0)
    width = 64
    backbone = dataclasses.replace(presets.PRESETS["bert_nano"], width=width)
    params = {
        "layer_2/norm2/scale": random.uniform(0.5, 3, width).astype(np.float32),
        "layer_2/norm2/bias": random.uniform(-2, 2, width).astype(np.float32),
        "head/output/kernel": random.standard_normal((width, 3)).astype(np.float32),
        "head/output/bias": np.zeros(3, np.float32),
    }
    model = config.Model("bert_nano", head=config.Head("fc", "cls"))
    found = equivalent.equivalent(backbone, model, 3, params).params
    x = random.standard_normal((100, width)).astype(np.float32)
    x[:, 0] *= 50  # an outlier, as BERT has them
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    x = x * params["layer_2/norm2/scale"] + params["layer_2/norm2/bias"]
    assert np.abs(x).max() > 15
    pooled = np.tanh(x @ found["pooler/dense/kernel"] + found["pooler/dense/bias"])
    expected = x.astype(np.float64) @ params["head/output/kernel"]
    # A millionth of each coordinate, and as much again for float32.
    bound = 2e-6 * np.abs(x) @ np.abs(params["head/output/kernel"])
    assert (np.abs(pooled @ found["head/output/kernel"] - expected) < bound).all()


def test_pipeline_gives_the_labels_and_probabilities_of_texts(text_run, our_logits, tmp_path):
    run = text_run("fc", "cls")
    folder = exported(run, tmp_path)
    texts = ["garlic", "a mask is new", "two doctors said , the mask\nis out 😷", "the vaccine of the city " * 9]
    ids = tokens.tokenise(texts, tokens.load_tokenizer(run / "tokenizer"), 40)
    batch = ids.padded(np.arange(len(texts)), 40), ids.lengths.astype(np.int32)
    logits = our_logits(run, Sequence(*batch))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classify = transformers.pipeline("text-classification", model=str(folder), truncation=True)
    for text, likely in zip(texts, expected, strict=True):
        found = {answer["label"]: answer["score"] for answer in classify(text, top_k=None)}
        np.testing.assert_allclose([found["fake"], found["real"]], likely, atol=1e-5)
        assert classify(text)[0]["label"] == ("fake", "real")[likely.argmax()]
    assert len(np.unique(expected[:, 0].round(4))) == len(texts)


def test_pipeline_prepares_images_as_training_did(image_run, our_logits, tmp_path):
    run = image_run("vit_nano", "fc", "cls", THREE, 12, scale="half")
    folder = exported(run, tmp_path)
    photo = np.random.default_rng(2).integers(0, 256, (20, 31, 3), np.uint8)
    resized = np.asarray(Image.fromarray(photo).resize((12, 12), Image.Resampling.BILINEAR))
    logits = our_logits(run, images.preprocess(resized[None], 12, "half"))[0]
    classify = transformers.pipeline("image-classification", model=str(folder))
    found = {answer["label"]: answer["score"] for answer in classify(Image.fromarray(photo))}
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose([found[name] for name in THREE], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "resize", "size", "levels"),
    [
        ("unit", "stretch", (31, 20), 0),  # as Pillow resizes them
        ("half", "stretch", (31, 20), 0),
        # Small ones, of which we do not round, and Pillow does after each of its two passes: half a level of 255 twice.
        ("imagenet", "stretch", (8, 8), 1),
        ("imagenet", "crop", (30, 30), 0),
        # Not square: transformers makes 18 x 12 of 31 x 20 (18.6 rounded down) and takes its middle, from 5.2 to 25.8
        # of the 31; ours is from 5 to 25. Less than a pixel of the result, 20 / 12 of these: where the sine is steep,
        # that is 127 * 5 * (20 / 12) / 31 = 34 levels.
        ("unit", "crop", (31, 20), 34),
    ],
)
def test_image_processor_gives_the_pixels_of_training(scale, resize, size, levels, tmp_path):
    from jaxtl.data import decode
    from jaxtl.data.listing import Listing, no_progress

    data = config.Images(scale=scale, resize=resize)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(huggingface.processor(data, 12)))
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    picture = np.stack([255 * x, 255 * y, 127 + 127 * np.sin(5 * (x + y))], axis=-1).astype(np.uint8)
    image = Image.fromarray(picture)
    listing = Listing(np.zeros(1, np.int32), ("a",), ("one",), [0], lambda items: [image.copy])
    decoded, _ = decode.decode([listing, listing], 12, resize, no_progress)
    expected = np.asarray(images.preprocess(decoded, 12, scale))[0]
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0]
    level = 1 / 255 / min(images.SCALES[scale][1])
    difference = np.abs(found.transpose(1, 2, 0) - expected).max()
    assert difference <= levels * level + 1e-5
    if levels:
        assert difference > 1e-3  # or the card need not say so


def test_module_for_other_heads_needs_no_jaxtl():
    source = Path(huggingface.__file__).with_name(huggingface.MODULE).read_text()
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"json", "re", "pathlib", "torch", "safetensors", "transformers"}


def test_auto_classes_run_no_code_of_the_folder(text_run, tmp_path):
    folder = exported(text_run("bigru", "sequence"), tmp_path)
    (folder / "modeling_jaxtl.py").write_text("raise SystemExit('run')")
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert type(model).__name__ == "BertModel"
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("which", ["whole", "beside"])
def test_card_holds_figures_and_classes_and_its_program_runs(which, text_run, tmp_path, monkeypatch, capsys):
    from huggingface_hub import ModelCard

    run = text_run("fc", "cls") if which == "whole" else text_run("bigru", "sequence")
    folder = exported(run, tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == ("text-classification" if which == "whole" else None)
    assert {result.metric_name: result.metric_value for result in card.data.eval_results}["accuracy"] == 0.8125
    for expected in (
        "`fake`, `real`",
        "| held out | 16 | 0.8125 | 0.4321 | 0.7654 |",
        "bfloat16; this export is float32",
    ):
        assert expected in card.text
    assert str(Path.home()) not in card.content  # made to be published
    assert str(tmp_path.parent.parent) not in card.content
    program = card.text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(program, "README.md", "exec"), {})
    sys.modules.pop("modeling_jaxtl", None)
    shown = capsys.readouterr().out
    assert "fake" in shown
    assert "real" in shown


@pytest.mark.parametrize("head", [("fc", "cls"), ("mlp", "cls")])
def test_program_of_the_card_answers_a_photo_as_prediction_does(head, image_run, tmp_path, monkeypatch, capsys):
    """Upright, and as small as the images of training before it is enlarged."""
    run = image_run("vit_nano", *head, THREE, 12, (6, 6), scale="half")
    folder = exported(run, tmp_path / "out")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    Image.fromarray(noise).save(folder / "image.jpg", exif=turned)
    card = (folder / "README.md").read_text()
    assert "had 6 x 6 pixels, and were enlarged to 12 x 12" in " ".join(card.split())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(compile(card.partition("```python\n")[2].partition("```")[0], "README.md", "exec"), {})
    sys.modules.pop("modeling_jaxtl", None)
    shown = ast.literal_eval(capsys.readouterr().out)
    found = shown if isinstance(shown, dict) else {answer["label"]: answer["score"] for answer in shown}
    model = jaxtl.load(run)
    (expected,) = model.predict_proba([folder / "image.jpg"])
    assert np.ptp(expected) > 0.1
    # The image processor rounds to levels of 255 after each of its two passes.
    np.testing.assert_allclose([found[name] for name in model.class_names], expected, rtol=0, atol=0.01)


# Real weights: six and twelve layers, features of up to 10 or so, of which float32 keeps seven digits.


@pytest.mark.weights
@pytest.mark.slow
def test_real_bert_gives_our_logits_in_torch(real_run, our_logits, tmp_path):
    run = real_run("minilm-l6", config.Text(max_length=64), "cls")
    folder = exported(run, tmp_path)
    texts = ["Masks work, says a new report of the WHO.", "Drinking hot water cures the virus! " * 9, "no"]
    ids = tokens.tokenise(texts, tokens.load_tokenizer(run / "tokenizer"), 64)
    expected = our_logits(run, Sequence(ids.padded(np.arange(3), 64), ids.lengths.astype(np.int32)))
    assert np.ptp(expected[:, 1]) > 0.2
    given = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, return_tensors="np"
    )
    found = answers(loaded("BertForSequenceClassification", folder), **given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("reads", ["cls", "cls_patches"])
def test_real_dinov2_gives_our_logits_in_torch(reads, real_run, our_logits, tmp_path):
    run = real_run("dinov2-small", config.Images(scale="imagenet"), reads)
    folder = exported(run, tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (7, 7, 3), np.uint8)  # patches, not noise
    picture = Image.fromarray(picture).resize((300, 240), Image.Resampling.BICUBIC)
    resized = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR))
    expected = our_logits(run, images.preprocess(resized[None], 224, "imagenet"))
    given = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="np")
    found = answers(loaded("Dinov2ForImageClassification", folder), **given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
