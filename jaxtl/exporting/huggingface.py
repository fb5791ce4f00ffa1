"""A run as a folder in Hugging Face's layout.

Where transformers has an architecture with this head, the folder holds that model whole. Elsewhere it holds the
backbone as transformers has it, and beside it the head: head.safetensors, head.json, and modeling_jaxtl.py, which puts
the two together in torch and is run by whoever imports it, by nothing else.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxtl import storage
from jaxtl.config import Images, Text
from jaxtl.data import images, tokens
from jaxtl.errors import UserError
from jaxtl.exporting import card
from jaxtl.exporting.equivalent import Equivalent, equivalent
from jaxtl.training import checkpoint
from jaxtl.training.network import TOKENIZER, FinishedRun, run_params
from jaxtl.weights import configs, convert, tables

MODULE = "modeling_jaxtl.py"


def write(run: FinishedRun, folder: Path) -> None:
    """Writes a run into a folder.

    Raises:
        UserError: what the run started from is gone, or the folder cannot be written.
    """
    net, params = run_params(run)
    model, classes = run.experiment.model, run.class_names
    found = equivalent(net.config, model, len(classes), params)
    storage.check_room(folder, sum(value.nbytes for value in found.params.values()))
    prefix = f"{found.config.family}." if "For" in found.architecture else ""
    backbone = convert.write(tables.table(found.config, top=found.top), found.params, prefix)
    head = convert.write(tables.head(model.head.kind), found.params) if classes else {}
    if found.whole:
        _save(folder / "model.safetensors", backbone | head)
    else:
        _save(folder / "model.safetensors", backbone)
        _save(folder / "head.safetensors", head)
        described = {"architecture": found.architecture, "reads": model.head.reads, "classes": classes}
        storage.write(folder / "head.json", _json(described))
        shutil.copyfile(Path(__file__).with_name(MODULE), folder / MODULE)
    tokenizer = None
    if isinstance(run.experiment.data, Text):
        tokenizer = tokens.load_tokenizer(run.folder / TOKENIZER)
        tokenizer.model_max_length = run.experiment.data.max_length  # what `truncation=True` cuts at
        tokenizer.save_pretrained(folder)
    else:
        storage.write(folder / "preprocessor_config.json", _json(processor(run.experiment.data, model.image_size)))
    storage.write(folder / "config.json", _json(_config(run, found, tokenizer)))
    storage.write(folder / "README.md", card.huggingface(run, found))


def processor(data: Images, size: int) -> dict[str, Any]:
    """Returns a `preprocessor_config.json` that prepares images as `jaxtl.data` does, but for rounding.

    Of an image that is not square, `resize=crop` cuts the square out first and resizes it then, transformers the other
    way round: where its side is rounded, that shifts by less than a pixel.
    """
    mean, deviation = images.SCALES[data.scale]
    square = {"height": size, "width": size}
    found = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": 2,  # Pillow's number for bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": data.scale != "unit",
        "image_mean": list(mean),
        "image_std": list(deviation),
    }
    if data.resize == "crop":
        cropped = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
        found |= {"image_processor_type": "BitImageProcessor", **cropped}
    return found


def _config(run: FinishedRun, found: Equivalent, tokenizer: Any) -> dict[str, Any]:
    fields = configs.fields(found.config)
    if not found.architecture:
        return fields
    from transformers import AutoConfig

    fields |= {"architectures": [found.architecture], "dtype": "float32"}
    if tokenizer is not None:
        fields["pad_token_id"] = tokenizer.pad_token_id
    if found.whole and run.class_names:
        fields["id2label"] = dict(enumerate(run.class_names))
        fields["label2id"] = {name: number for number, name in enumerate(run.class_names)}
    elif found.top == "classifier":  # the pretrained one
        fields["id2label"] = {number: f"LABEL_{number}" for number in range(found.config.classes)}
        fields["label2id"] = {f"LABEL_{number}": number for number in range(found.config.classes)}
    if found.whole and found.architecture == "BertForSequenceClassification":
        fields["classifier_dropout"] = run.experiment.model.head.dropout
    return AutoConfig.for_model(**fields).to_diff_dict()


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        save_file(dict(arrays), path, metadata={"format": "pt"})  # which transformers asks for
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors 0.8 lets nobody else read it
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.parent.parent} cannot be written to: {checkpoint.one_line(error)}") from None


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
