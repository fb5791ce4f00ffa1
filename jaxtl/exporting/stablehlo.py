"""A run as one compiled-anywhere function: StableHLO, made and read by `jax.export`, parameters inside.

It is traced in float32 without what `jaxtl.models.kernels` does for single backends, so that one file is right on all
of them, whichever it was made on.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxtl import storage
from jaxtl.config import Text
from jaxtl.data import images, tokens
from jaxtl.errors import UserError
from jaxtl.exporting import card
from jaxtl.models import kernels
from jaxtl.models.stages import Sequence
from jaxtl.training import step
from jaxtl.training.network import TOKENIZER, FinishedRun, network, run_params

ARTIFACT, SIGNATURE = "model.jax_export", "signature.json"
_PLATFORMS = ("cpu", "cuda", "tpu")
_MOST = 2**31 - 2**24  # bytes: `jax.export` writes a FlatBuffer, which addresses 2 GiB


def write(run: FinishedRun, folder: Path) -> None:
    """Writes a run into a folder.

    Raises:
        UserError: what the run started from is gone, the model is too large, or the folder cannot be written.
    """
    _, params = run_params(run)
    size = sum(value.nbytes for value in params.values())
    if size > _MOST:
        raise UserError(
            f"the parameters take {size / 1e9:.1f} GB, and a file of jax.export holds 2: use --format=huggingface"
        )
    storage.check_room(folder, size)
    experiment = dataclasses.replace(
        run.experiment, train=dataclasses.replace(run.experiment.train, precision="float32")
    )
    net = network(experiment, len(run.class_names), run.folder)
    inputs = _inputs(run)
    function = _function(run, step.forward(net.structure, _preparation(run)), params)
    with kernels.plain():
        exported = export.export(jax.jit(function), platforms=_PLATFORMS)(*inputs.values())
    with storage.written_whole(folder / ARTIFACT, binary=True) as file:
        file.write(exported.serialize())
    described = {
        "file": ARTIFACT,
        "made_with": {"jax": jax.__version__, "calling_convention_version": exported.calling_convention_version},
        "platforms": list(exported.platforms),
        "inputs": _described(inputs),
        "outputs": _described(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        "classes": list(run.class_names),
    }
    if isinstance(run.experiment.data, Text):
        described["longest"] = run.experiment.data.max_length
        tokens.load_tokenizer(run.folder / TOKENIZER).save_pretrained(folder / TOKENIZER)
    storage.write(folder / SIGNATURE, json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    storage.write(folder / "README.md", _readme(run, described))


_MEANINGS = {
    "images": "RGB pixels from 0 to 255, of the size that those of training had; the rest is part of the model",
    "ids": "word pieces, filled up at the end with anything",
    "lengths": "word pieces of each text, at least 1",
    "positions": "those of the word pieces to predict",
    "logits": "before softmax",
    "probabilities": "of each class, in the order of `classes`",
}


def _inputs(run: FinishedRun) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract inputs by name: any number of examples, and of texts any length up to the longest."""
    model, data = run.experiment.model, run.experiment.data
    if not isinstance(data, Text):
        (batch,) = export.symbolic_shape("batch")
        return {"images": jax.ShapeDtypeStruct((batch, *run.image_shape, 3), jnp.uint8)}
    limits = [f"length <= {data.max_length}"]
    batch, length, read = export.symbolic_shape("batch, length, read", constraints=limits)
    found = {
        "ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    return found | ({"positions": jax.ShapeDtypeStruct((batch, read), jnp.int32)} if model.head.kind == "mlm" else {})


def _preparation(run: FinishedRun) -> step.Prepare:
    model, data = run.experiment.model, run.experiment.data
    if isinstance(data, Text):
        return step.unchanged
    return lambda batch, key: {"input": images.preprocess(batch["input"], model.image_size, data.scale)}


def _function(run: FinishedRun, forward: Callable[..., Any], params: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Returns the function of the inputs, in their order, that gives the outputs by name."""
    params = {path: np.asarray(value) for path, value in params.items()}

    def function(*inputs: jax.Array) -> dict[str, jax.Array]:
        x = Sequence(*inputs) if isinstance(run.experiment.data, Text) else inputs[0]
        logits = forward(params, {}, {"input": x})
        if not run.class_names:
            return {"logits": logits}
        if logits.shape[-1] == 1:  # of two classes: softmax of 0 and z is the sigmoid of z
            logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
        return {"logits": logits, "probabilities": jax.nn.softmax(logits, axis=-1)}

    return function


def _described(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": [size if isinstance(size, int) else str(size) for size in array.shape],
            "dtype": array.dtype.name,
            "meaning": _MEANINGS[name],
        }
        for name, array in arrays.items()
    ]


_LOAD = (
    "import json",
    "from pathlib import Path",
    "",
    "import numpy as np",
    "from jax import export",
)
_OPEN = (
    "",
    'folder = Path(".")  # where this file lies',
    f'model = export.deserialize((folder / "{ARTIFACT}").read_bytes())',
)
_ANSWER = (
    f'classes = json.loads((folder / "{SIGNATURE}").read_text())["classes"]',
    'print(classes, np.asarray(answers["probabilities"]))',
)


def _readme(run: FinishedRun, described: dict[str, Any]) -> str:
    rows = [
        (kind[:-1], f"`{array['name']}`", f"{array['dtype']} {array['shape']}".replace("'", ""), array["meaning"])
        for kind in ("inputs", "outputs")
        for array in described[kind]
    ]
    notes = [
        f"Any `batch` is taken; each new one is compiled once. Platforms: {', '.join(described['platforms'])}. All is "
        "computed in float32. The file can be read by the jax that made it "
        f"({described['made_with']['jax']}) and by later ones, for at least six months (the promise of `jax.export`).",
    ]
    if "longest" in described:
        notes.append(
            f"Any `length` up to {described['longest']} is taken, and none above; each new one is compiled "
            "once, so fill batches up to a few lengths. What lies beyond `lengths` changes nothing."
        )
    return "\n".join(
        [
            f"# {run.folder.resolve().name}",
            "",
            f"{card.what(run)} A function of `jax.export`, its parameters inside: it needs "
            "`pip install jax flatbuffers`, and not jaxtl.",
            "",
            "## Use",
            "",
            *card.python(*_LOAD, *_program(run, described)),
            "",
            *card.table(("", "name", "shape", ""), rows),
            *(line for note in notes for line in ("", note)),
            *card.about(run),
        ]
    )


def _program(run: FinishedRun, described: dict[str, Any]) -> list[str]:
    if not isinstance(run.experiment.data, Text):
        return [
            "from PIL import Image, ImageOps",
            *_OPEN,
            *card.opened(run),
            "answers = model.call(np.stack([np.asarray(image)]))",
            *_ANSWER,
        ]
    tokenise = [
        "from tokenizers import Tokenizer",
        *_OPEN,
        f'tokenizer = Tokenizer.from_file(str(folder / "{TOKENIZER}" / "tokenizer.json"))',
        f"tokenizer.enable_truncation({described['longest']})",
    ]
    if run.class_names:
        return [
            *tokenise,
            'texts = [tokenizer.encode(text).ids for text in ("a text", "another one")]',
            "lengths = np.array([len(ids) for ids in texts], np.int32)",
            "ids = np.array([ids + [0] * (max(lengths) - len(ids)) for ids in texts], np.int32)",
            "answers = model.call(ids, lengths)",
            *_ANSWER,
        ]
    return [
        *tokenise,
        'encoded = tokenizer.encode("This is [MASK].")',
        "ids, lengths = np.array([encoded.ids], np.int32), np.array([len(encoded.ids)], np.int32)",
        'positions = np.array([[encoded.tokens.index("[MASK]")]], np.int32)',
        'best = np.asarray(model.call(ids, lengths, positions)["logits"])[0, 0].argsort()[:-6:-1]',
        "print([tokenizer.id_to_token(int(number)) for number in best])",
    ]
