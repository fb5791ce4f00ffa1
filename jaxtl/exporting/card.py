"""The README.md of an exported model: what it is, how it is loaded, how good it is, how it was made, what it is not.

Names of local folders are left out: the text is made to be published.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from jaxtl.config import RANDOM, Images, Text
from jaxtl.evaluation import metrics
from jaxtl.exporting.equivalent import Equivalent
from jaxtl.training.network import FinishedRun
from jaxtl.weights import hub

_MANY_CLASSES = 50  # more are not listed

_TASKS = {"mlm": "fill-mask", Text: "text-classification", Images: "image-classification"}

_PIPELINE = {
    "text-classification": 'classify = pipeline("text-classification", model=folder, truncation=True)\n'
    'print(classify(["a text", "another"], top_k=None))  # every class with its probability',
    "image-classification": 'classify = pipeline("image-classification", model=folder)\nprint(classify(image))',
    "fill-mask": 'fill = pipeline("fill-mask", model=folder)\nprint(fill("This is [MASK]."))',
}
_INPUTS = {
    "text-classification": (
        "AutoTokenizer",
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt")\n'
        'inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}',
    ),
    "image-classification": (
        "AutoImageProcessor",
        'inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")',
    ),
}


def huggingface(run: FinishedRun, found: Equivalent) -> str:
    """Returns the model card of a folder in Hugging Face's layout, with its metadata."""
    return "\n".join(
        [
            "---",
            _metadata(run, found),
            "---",
            "",
            f"# {run.folder.resolve().name}",
            "",
            f"{what(run)} Trained and exported with jaxtl.",
            "",
            "## Use",
            "",
            *_use(run, found),
            *(line for note in (*found.notes, *_pixels(run)) for line in ("", note)),
            *about(run),
        ]
    )


def about(run: FinishedRun) -> list[str]:
    """Returns the sections that do not depend on the format: classes, figures, training, limitations."""
    return [
        "",
        *(["## Classes", "", _listed(run.class_names), ""] if run.class_names else []),
        "## Figures",
        "",
        *_figures(run),
        "",
        "## Training",
        "",
        *table(("setting", "value"), _training(run)),
        "",
        "## Limitations",
        "",
        *(f"- {sentence}" for sentence in _limitations(run)),
        "",
    ]


def what(run: FinishedRun) -> str:
    """Returns a sentence that says what the model is."""
    family = {"bert": "BERT", "vit": "ViT", "deit": "DeiT (distilled)", "dinov2": "DINOv2", "vgg": "VGG19"}
    head = run.experiment.model.head
    of = family[run.result["architecture"]["family"]]
    if head.kind == "mlm":
        return f"{of} that fills in masked words."
    kinds = {
        "fc": "a linear layer",
        "mlp": f"a hidden layer of {head.hidden} and a linear one",
        "bigru": f"a bidirectional GRU of {head.hidden} in each direction and a linear layer",
    }
    things = "texts" if isinstance(run.experiment.data, Text) else "images"
    return f"{of} with {kinds[head.kind]} that tells {len(run.class_names)} classes of {things} apart."


def task(run: FinishedRun) -> str:
    """Returns what Hugging Face calls the task."""
    return _TASKS.get(run.experiment.model.head.kind) or _TASKS[type(run.experiment.data)]


def _metadata(run: FinishedRun, found: Equivalent) -> str:
    data, result = run.experiment.data, run.result
    split, judged = _judged(result)
    name = _data_name(data)
    figures = {"accuracy": "accuracy", "f1_macro": "f1", "perplexity": "perplexity", "loss": "loss"}
    measured = [
        EvalResult(
            task_type=task(run),
            dataset_type=name.replace(" ", "_"),
            dataset_name=name,
            dataset_split=split.replace(" ", "_"),
            metric_type=kind,
            metric_name=field,
            metric_value=round(judged[field], 6),
        )
        for field, kind in figures.items()
        if field in judged
    ]
    weights = run.experiment.model.weights
    return ModelCardData(
        model_name=run.folder.resolve().name,
        eval_results=measured,
        library_name="transformers" if found.architecture else "pytorch",
        pipeline_tag=task(run) if found.whole else None,
        base_model=weights if _from_hub(weights) else None,
        tags=["jaxtl", task(run)],
    ).to_yaml()


def _use(run: FinishedRun, found: Equivalent) -> list[str]:
    where = 'folder = "."  # where this file lies'
    of_images = isinstance(run.experiment.data, Images)
    pillow = ["from PIL import Image, ImageOps"] if of_images else []
    image = opened(run) if of_images else []
    if found.whole:
        return [
            f"The whole model, as `{found.architecture}`:",
            "",
            *python(*pillow, "from transformers import pipeline", "", where, *image, _PIPELINE[task(run)]),
        ]
    auto, inputs = _INPUTS[task(run)]
    lines = [
        "transformers has no architecture with this head. `model.safetensors` is the backbone, `head.safetensors` the "
        "head; `modeling_jaxtl.py` puts them together, in torch, without jaxtl. Read it; nothing runs it but you:",
        "",
        *python(
            "import sys",
            "",
            "import torch",
            *pillow,
            f"from transformers import {auto}",
            "",
            where,
            "sys.path.append(folder)",
            "from modeling_jaxtl import load",
            "",
            "model = load(folder)",
            *image,
            inputs,
            "with torch.no_grad():",
            "    probabilities = model(**inputs).softmax(dim=-1)",
            "print(dict(zip(model.classes, probabilities[0].tolist())))",
        ),
    ]
    if not found.architecture:
        return [*lines, "", "The backbone's weights have torchvision's names (`torchvision.models.vgg19`)."]
    auto = "AutoModelForImageClassification" if found.top == "classifier" else "AutoModel"
    pooler = "" if found.top or found.config.family == "dinov2" else ", add_pooling_layer=False"
    lines += ["", f"The backbone alone is `{auto}.from_pretrained(folder{pooler})`."]
    if found.top == "classifier":
        lines[-1] += " The classes of that are those of its pretraining, which the head reads; not those below."
    return lines


def _figures(run: FinishedRun) -> list[str]:
    result = run.result
    splits = [("held out", result["held_out"], result["eval_examples"])]
    if result.get("test"):
        splits.append(("test", result["test"], result["test_examples"]))
    columns = [("accuracy", "accuracy"), ("loss", "loss"), ("f1_macro", "macro F1"), ("perplexity", "perplexity")]
    columns = [(field, heading) for field, heading in columns if field in splits[0][1]]
    rows = [(name, f"{count:,}", *(f"{judged[field]:.4f}" for field, _ in columns)) for name, judged, count in splits]
    lines = table(("split", "examples", *(heading for _, heading in columns)), rows)
    split, judged = _judged(result)
    if 0 < len(run.class_names) <= _MANY_CLASSES:
        per_class = [
            (f"`{name}`", *(f"{judged[figure][name]:.4f}" for figure in ("precision", "recall", "f1")))
            for name in run.class_names
        ]
        lines += ["", f"By class, {split}:", "", *table(("class", "precision", "recall", "F1"), per_class)]
    if result["reported"]:
        flat = metrics.flat({**result, **judged})
        reported = [
            (path, "" if flat.get(path) is None else _number(flat[path]), _number(value))
            for path, value in result["reported"].items()
        ]
        lines += ["", "Beside the figures that are published for this recipe:", ""]
        lines += table(("figure", "this model", "published"), reported)
    return lines


def _training(run: FinishedRun) -> list[tuple[str, str]]:
    experiment, result = run.experiment, run.result
    model, data, optim, train = experiment.model, experiment.data, experiment.optim, experiment.train
    rows = [
        ("started from", model.weights if _from_hub(model.weights) else _local(model.weights)),
        ("head", f"`{model.head.kind}`, reads `{model.head.reads}`"),
        (
            "parameters trained",
            f"{result['trainable_parameters']:,} of {result['total_parameters']:,}",
        ),
        ("data", _data_name(data)),
        ("examples", f"{result['train_examples']:,} for training, {result['eval_examples']:,} held out"),
        ("optimiser", f"`{optim.name}`, learning rate {optim.learning_rate:g}, `{optim.schedule}` schedule"),
        ("length", f"{result['steps']:,} steps of {train.batch_size}; kept: step {result['selected_step']:,}"),
        ("precision", train.precision),
        ("seed", str(train.seed)),
    ]
    if result["test_examples"]:
        rows[4] = (rows[4][0], f"{rows[4][1]}, {result['test_examples']:,} for the test")
    if isinstance(data, Text):
        rows.append(("texts", f"the first {data.max_length} word pieces"))
    else:
        rows.append(
            ("images", f"{model.image_size} pixels, `{data.resize}`, `{data.scale}`, augmented: {data.augment}")
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [*rows, ("versions", versions)]


def _limitations(run: FinishedRun) -> list[str]:
    experiment, result = run.experiment, run.result
    split, _ = _judged(result)
    found = []
    if run.class_names:
        things = "text" if isinstance(experiment.data, Text) else "image"
        found.append(f"It answers every {things} with one of the classes above, whatever the {things} is.")
        found.append("Its probabilities were not calibrated.")
    found.append(f"The figures are those of one run, on the {split} examples of {_data_name(experiment.data)}.")
    if experiment.train.select == "best" and split != "test":
        found.append("The parameters were chosen on those same examples: expect somewhat lower figures on others.")
    if experiment.train.precision != "float32":
        found.append(
            f"It was trained and judged in {experiment.train.precision}; this export is float32, and its logits differ "
            "by the rounding of that."
        )
    if isinstance(experiment.data, Text):
        found.append(
            f"Of a text, what comes after {experiment.data.max_length} word pieces was never seen in training."
        )
    if experiment.model.weights != RANDOM:
        found.append("Licence and biases of the weights it started from come with it.")
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if value > 1 and float(value).is_integer() else f"{value:.4f}"  # a count, or a share


def _judged(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return ("test", result["test"]) if result.get("test") else ("held out", result["held_out"])


def _data_name(data: Text | Images) -> str:
    if data.name:
        return data.name
    return (
        "local texts"
        if isinstance(data, Text)
        else "scikit-learn's digits"
        if data.source == "digits"
        else "local images"
    )


def _from_hub(weights: str) -> bool:
    return weights != RANDOM and hub.is_repo_id(weights) and not Path(weights).expanduser().exists()


def _local(weights: str) -> str:
    return "random values" if weights == RANDOM else f"local weights, `{Path(weights).name}`"


def _pixels(run: FinishedRun) -> list[str]:
    """Returns in how far the image processor gives the pixels of training."""
    data = run.experiment.data
    if not isinstance(data, Images):
        return []
    (height, width), size = run.image_shape, run.experiment.model.image_size
    found = []
    if (height, width) != (size, size):
        found.append(
            f"The images of training had {height} x {width} pixels, and were enlarged to {size} x {size}. Others have "
            "to be made as small first, as above: enlarged or shrunk to the model's size at once, they would be "
            "sharper than any that it has seen, and the answers other ones."
        )
    found.append(
        "The image processor resizes to whole numbers from 0 to 255. In training, images smaller than "
        f"{run.experiment.model.image_size} pixels that are all of one size were not rounded in resizing: up to one "
        "of those numbers apart. It does not lay transparent parts over white."
    )
    if data.resize == "crop":
        found.append(
            "Of images that are not square, training cut the square out and resized it; the image processor resizes "
            "first: its square may lie part of a pixel apart."
        )
    return found


def opened(run: FinishedRun) -> list[str]:
    """Returns the lines of a program that open an image as training did, up to its own resizing of all of them."""
    height, width = run.image_shape
    lines = ['image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")']
    if run.experiment.data.resize == "crop":
        return [*lines, f"image = ImageOps.fit(image, ({width}, {height}), 2)  # as in training; 2: bilinear"]
    return [*lines, f"image = image.resize(({width}, {height}), 2)  # as in training; 2: bilinear"]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_MANY_CLASSES])
    return shown + (f" and {len(names) - _MANY_CLASSES} more" if len(names) > _MANY_CLASSES else "")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a table as Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def python(*lines: str) -> list[str]:
    """Returns a program as Markdown."""
    return ["```python", *lines, "```"]
