"""What a run that has ended shows of itself: its report, made of what it knows."""

import dataclasses
import datetime
import json
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxtl import remote
from jaxtl.config import Images
from jaxtl.data import decode, images, loader, sources
from jaxtl.data.listing import Examples, Listing, Ragged
from jaxtl.errors import UserError
from jaxtl.evaluation import metrics, pages, report
from jaxtl.evaluation.figures import Figure
from jaxtl.evaluation.report import Answer, Content, Example
from jaxtl.progress import say
from jaxtl.training import freeze, run
from jaxtl.training.evaluate import preparation
from jaxtl.training.setup import Setup, count

_SPLITS = ("training", "held-out", "test")
_IMAGES, _TEXTS = 8, 4  # shown before and after preprocessing
_SIDE = 160  # pixels of a thumbnail: twice what it is shown in, for screens with fine pixels


def write(
    workdir: Path,
    this: Setup,
    drawn: Sequence[Listing | Examples],
    logits: np.ndarray | None,
    result: dict[str, Any],
    history: str,
) -> list[Figure]:
    """Writes the report into the run folder, and returns its figures; none where it cannot be written, which is said.

    The run is worth more than its report: whatever goes wrong here does not end it.

    Args:
        workdir: the run folder.
        this: the run.
        drawn: its splits, of which images are not decoded.
        logits: of the last split, in its order; None of masked language modelling.
        result: what result.json is to hold.
        history: what metrics.jsonl holds.
    """
    try:
        return report.write(workdir / run.REPORT, _content(workdir, this, drawn, logits, result, history))
    except Exception as error:
        if not isinstance(error, OSError | UserError):
            traceback.print_exc()
        reason = " ".join(str(error).split()) or type(error).__name__
        say(
            f"NO REPORT: {workdir / run.REPORT / report.PAGE} cannot be written ({reason}). The run itself is not "
            f"affected; to have it written later, remove {workdir / run.RESULT} and give the same command again: "
            "nothing is trained anew"
        )
        return []


def _content(
    workdir: Path,
    this: Setup,
    drawn: Sequence[Listing | Examples],
    logits: np.ndarray | None,
    result: dict[str, Any],
    history: str,
) -> Content:
    experiment, judged = this.experiment, drawn[-1]
    likely = None if logits is None else metrics.probabilities(logits)
    of_images = isinstance(experiment.data, Images)
    examples, answers, tiny = [], [], False
    if of_images:
        examples, tiny = _images_prepared(this, drawn[0])
    else:
        examples = _texts_prepared(this, drawn[0])
    if likely is not None:
        answers = _answers(judged, likely)
    return Content(
        name=workdir.absolute().name,
        command=f"python -m jaxtl.main --experiment={shlex.quote(remote.shown(workdir / run.EXPERIMENT))}",
        finished=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        settings=dataclasses.asdict(experiment),
        result=result,
        history=[json.loads(line) for line in history.splitlines()],
        stages=_stages(this),
        counts={
            name: np.bincount(split.labels, minlength=max(len(split.class_names), 1)).tolist()
            for name, split in zip(_SPLITS, drawn, strict=False)
        },
        kind="images" if of_images else "texts",
        labels=None if likely is None else judged.labels,
        likely=likely,
        examples=examples,
        preparation=_in_words(this),
        answers=answers,
        tiny=tiny,
    )


def _stages(this: Setup) -> dict[str, dict[str, int]]:
    found = {stage: {"trained": 0, "frozen": 0} for stage in this.net.stages}
    for kind, params in zip(("trained", "frozen"), freeze.partition(this.net.params, this.labels), strict=True):
        for path, leaf in params.items():
            found[path.partition("/")[0]][kind] += count({path: leaf})
    return {stage: numbers for stage, numbers in found.items() if sum(numbers.values())}  # pooling has no parameters


# --- examples before and after ------------------------------------------------------------------------------


def _rows(labels: np.ndarray, most: int) -> np.ndarray:
    """Returns the first rows of each class in turn, a few in all."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    turn = np.empty(len(labels), int)
    turn[order] = np.arange(len(labels)) - starts  # how many of its class come before it
    return np.lexsort((labels, turn))[:most]


def _prepared(this: Setup, examples: Examples, key: jax.Array | None) -> dict[int, dict[str, np.ndarray]]:
    """Returns what the model gets of each example, by its number."""
    prepare, found = jax.jit(preparation(this)), {}
    for batch in loader.batches(examples, len(examples.labels), seed=None, lengths=this.lengths):
        after = jax.tree.map(np.asarray, prepare(batch, key))
        for place, row in enumerate(batch["index"]):
            if row >= 0:
                found[int(row)] = jax.tree.map(lambda leaf, place=place: leaf[place], after)
    return found


def _images_prepared(this: Setup, split: Listing) -> tuple[list[Example], bool]:
    data, size = this.experiment.data, this.experiment.model.image_size
    shown = split.take(_rows(split.labels, _IMAGES))
    (examples,) = sources.read([shown], data.resize, size)
    key = None if data.augment == "none" else jax.random.key(this.experiment.train.seed)
    after = _prepared(this, examples, key)
    before = decode.thumbnails(shown, 2 * _SIDE)
    found = [
        Example(
            id=examples.ids[row],
            label=split.class_names[examples.labels[row]],
            before=pages.thumbnail(before[row]),
            after=pages.thumbnail(Image.fromarray(images.visible(after[row]["input"], data.scale))),
        )
        for row in range(len(examples.labels))
    ]
    return found, max(max(image.size) for image in before) <= pages.TINY


def _texts_prepared(this: Setup, split: Examples) -> list[Example]:
    rows = _rows(split.labels, _TEXTS)
    pieces = [split.inputs.values[slice(*split.inputs.offsets[row : row + 2])] for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in pieces])])
    chosen = dataclasses.replace(
        split,
        inputs=Ragged(np.concatenate(pieces), offsets),
        labels=split.labels[rows],
        ids=tuple(split.ids[row] for row in rows),
        texts=tuple(split.texts[row] for row in rows),
    )
    after = _prepared(this, chosen, None)
    special = set(this.tokenizer.all_special_ids)
    found = []
    for row, text in enumerate(chosen.texts):
        ids, length, positions = after[row]["input"]
        hidden = set()
        if positions is not None:
            hidden = {int(place) for place, weight in zip(positions, after[row]["weight"], strict=True) if weight}
        ids = ids[:length].tolist()
        kinds = ["hidden-piece" if place in hidden else "special" * (id_ in special) for place, id_ in enumerate(ids)]
        names = this.tokenizer.convert_ids_to_tokens(ids)
        label = chosen.class_names[chosen.labels[row]] if chosen.class_names else ""
        found.append(Example(chosen.ids[row], label, text=_cut(text), pieces=tuple(zip(names, kinds, strict=True))))
    return found


def _in_words(this: Setup) -> str:
    experiment, data = this.experiment, this.experiment.data
    if isinstance(data, Images):
        size = experiment.model.image_size
        resized = {"stretch": "stretched", "crop": "cut to the square in the middle and resized"}[data.resize]
        scaled = {
            "unit": "from 0 to 1",
            "half": "from -1 to 1",
            "imagenet": "scaled by ImageNet's mean and deviation",
        }[data.scale]
        changed = {"none": "", "flip": ", flipped at random", "crop_flip": ", cut and flipped at random"}[data.augment]
        return (
            f"Left: the file. Right: what the model gets, {resized} to {size} x {size} pixels{changed}; its values are "
            f"{scaled}, and shown here as the colours that they stand for."
        )
    words = f"Below each text, its word pieces as the model gets them, at most {data.max_length}."
    if experiment.model.head.kind == "mlm":
        words += f" Framed: the {data.mask_rate:.0%} that are to be guessed, most of them hidden."
    return words


# --- answers ------------------------------------------------------------------------------------------------


def _answers(split: Listing | Examples, likely: np.ndarray) -> list[Answer]:
    of_images = isinstance(split, Listing)
    rows = report.shown_rows(likely, split.labels, report.MOST_IMAGES if of_images else report.MOST_TEXTS)
    thumbnails = (
        [pages.thumbnail(image) for image in decode.thumbnails(split.take(rows), _SIDE)]
        if of_images
        else [""] * len(rows)
    )
    predicted = likely.argmax(axis=-1)
    return [
        Answer(
            id=split.ids[row],
            label=split.class_names[split.labels[row]],
            prediction=split.class_names[predicted[row]],
            probability=float(likely[row, predicted[row]]),
            text="" if of_images else _cut(split.texts[row]),
            image=thumbnail,
        )
        for row, thumbnail in zip(rows, thumbnails, strict=True)
    ]


def _cut(text: str) -> str:
    most = report.MOST_CHARACTERS
    return text if len(text) <= most else text[:most] + " …"
