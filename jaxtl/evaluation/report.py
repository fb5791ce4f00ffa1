"""The report of a run: one page, and its figures as PNG files. `Content` holds all that is in it, as plain values."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from jaxtl import storage
from jaxtl.evaluation import figures, metrics, pages, terminal
from jaxtl.evaluation.figures import Curve, Figure
from jaxtl.evaluation.predictions import errors_first

PAGE = "index.html"
# What is put into the page: more would make it slow to open. The table beside it has all.
MOST_IMAGES, MOST_TEXTS = 200, 5000
MOST_CHARACTERS = 1000  # of a text
_CONFUSIONS = 30
_ROWS = 50  # of a list, until more are asked for


@dataclasses.dataclass(frozen=True)
class Example:
    """A training example, before and after what is done to it for the model.

    Attributes:
        label: name of its class; empty without labels.
        before, after: of an image: the file as it is, and as the model gets it, as `data:` addresses.
        text: of a text.
        pieces: of a text: (word piece, "" or `special`, or `hidden-piece`: one that masked language modelling hides).
    """

    id: str
    label: str
    before: str = ""
    after: str = ""
    text: str = ""
    pieces: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said of an example.

    Attributes:
        image: as a `data:` address; empty for texts.
        probability: of the class that was predicted.
    """

    id: str
    label: str
    prediction: str
    probability: float
    text: str = ""
    image: str = ""

    @property
    def verdict(self) -> str:
        """`right` or `wrong`."""
        return "right" if self.label == self.prediction else "wrong"


@dataclasses.dataclass(frozen=True)
class Content:
    """What a report is made of.

    Attributes:
        name: of the run.
        command: repeats it.
        finished: when, for people.
        settings: of the experiment, nested.
        result: what result.json holds.
        history: what metrics.jsonl holds.
        stages: stage -> {"trained": parameters, "frozen": parameters}.
        counts: split -> examples of each class, in the order of `result["classes"]`; of texts without labels, (all,).
        kind: `images` or `texts`.
        labels: `[examples]` int32 of the judged split; None where there are no classes.
        likely: `[examples, classes]` probabilities of it; None where there are no classes.
        examples: some of the training split.
        preparation: what is done to an example before the model gets it, in words.
        answers: those that are shown, of all.
        tiny: images are so small that their pixels are to be seen as squares.
    """

    name: str
    command: str
    finished: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    stages: Mapping[str, Mapping[str, int]]
    counts: Mapping[str, Sequence[int]]
    kind: str
    labels: np.ndarray | None = None
    likely: np.ndarray | None = None
    examples: Sequence[Example] = ()
    preparation: str = ""
    answers: Sequence[Answer] = ()
    tiny: bool = False


def write(folder: Path, content: Content) -> list[Figure]:
    """Writes the page and the figures into a folder, which is made; returns the figures.

    Raises:
        UserError: that cannot be done.
        OSError: the folder cannot be made.
    """
    drawn = draw(content)
    page = render(content, drawn)
    folder.mkdir(exist_ok=True)
    for figure in drawn.values():
        with storage.written_whole(folder / f"{figure.name}.png", binary=True) as file:
            file.write(figure.png)
    storage.write(folder / PAGE, page)
    return list(drawn.values())


def shown_rows(likely: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """Returns the rows to show: the most confident errors first, then right answers, from the surest to the least.

    Of more than `most`, errors take up to three quarters, more where there are too few right answers to fill the rest;
    the right ones are taken at equal distances.
    """
    order = errors_first(likely, labels)
    errors = int(np.sum(likely.argmax(axis=-1) != labels))
    wrong, right = order[:errors], order[errors:]
    wrong = wrong[: max(most * 3 // 4, most - len(right))]
    room = min(len(right), most - len(wrong))
    return np.concatenate([wrong, right[np.linspace(0, max(len(right) - 1, 0), room).astype(int)]])


def draw(content: Content) -> dict[str, Figure]:
    """Returns the figures that the content has values for, by name."""
    names, found = content.result["classes"], []
    split = f"{len(content.labels):,} {_split(content)} {content.kind}" if content.labels is not None else ""
    found += _curves(content)
    found.append(figures.stages(content.stages))
    if names:
        found.append(figures.class_counts(content.counts, names))
    if content.likely is not None:
        found.append(figures.confusion(_confusion(content), names, split))
        found.append(figures.reliability(metrics.calibration(content.likely, content.labels), split))
    return {figure.name: figure for figure in found}


def render(content: Content, drawn: Mapping[str, Figure]) -> str:
    """Returns the page."""
    split, judged = terminal.judged_split(content.result)
    return pages.render(
        "report.html.j2",
        it=content,
        result=content.result,
        figures=drawn,
        subject=_subject(content),
        split=_split(content),
        tiles=_tiles(content, judged),
        facts=_facts(content),
        reported=_reported(content, split, judged),
        settings=list(_flat(content.settings)),
        by_class=_by_class(content, judged),
        confusions=_confusions(content),
        most_images=MOST_IMAGES,
        rows=_ROWS,
        examined=0 if content.labels is None else len(content.labels),
    )


# --- what the page says ------------------------------------------------------------------------------------


def _split(content: Content) -> str:
    return "test" if content.result.get("test") else "held-out"


def _subject(content: Content) -> str:
    """Returns what was trained on what, by the last part of their names."""
    model, data = content.settings["model"], content.settings["data"]
    preset = model["preset"] if model["preset"] != "from_weights" else Path(model["weights"]).name
    return f"{preset} on {data['name'] or Path(data['dir']).name or data.get('source') or content.kind}"


def _tiles(content: Content, judged: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (what, figure, note) of the figures that one looks for first."""
    result = content.result
    on = f"on {result['test_examples'] or result['eval_examples']:,} {_split(content)} {content.kind}"
    tiles = []
    if content.labels is not None:
        share, count = judged["accuracy"], len(content.labels)
        error = math.sqrt(share * (1 - share) / count)
        tiles.append(("Accuracy", f"{share:.4f}", f"± {error:.4f} (one standard error), {on}"))
        tiles.append(("Loss", f"{judged['loss']:.4f}", "mean cross-entropy, nats"))
        tiles.append(("Macro F1", f"{judged['f1_macro']:.4f}", "mean over the classes"))
        if judged.get("roc_auc") is not None:
            tiles.append(("ROC-AUC", f"{judged['roc_auc']:.4f}", "1 is perfect, 0.5 is chance"))
        error = metrics.calibration(content.likely, content.labels).error
        tiles.append(("Calibration error", f"{error:.4f}", "ECE, see below"))
    else:
        before = result.get("before") or {}
        for heading, field, form in (("Perplexity", "perplexity", "{:,.2f}"), ("Masked accuracy", "accuracy", "{:.4f}"),
                                     ("Loss", "loss", "{:.4f}")):  # fmt: skip
            note = f"{form.format(before[field])} before training" if field in before else ""
            tiles.append((heading, form.format(judged[field]), note or on))
    trained, total = result["trainable_parameters"], result["total_parameters"]
    tiles.append(("Trained", figures.percent(trained / total), f"{trained:,} of {total:,} parameters"))
    tiles.append(("Time", _duration(result["seconds_total"]), f"{_duration(result['seconds_per_epoch'])} an epoch"))
    return tiles


def _facts(content: Content) -> list[tuple[str, str]]:
    """Returns what ran, (what, words)."""
    settings, result = content.settings, content.result
    model, data, train, optim = (settings[name] for name in ("model", "data", "train", "optim"))
    head = f"{model['head']['kind']} on {model['head']['reads']}" if model["head"]["kind"] != "mlm" else "masked words"
    source = data.get("source", "auto")
    files = (*data.get("train", ()), data.get("validation", ""), data.get("test", ""))
    source = " ".join(filter(None, ("" if source == "auto" else source, data["name"], data["dir"], *files)))
    sizes = ", ".join(f"{sum(numbers):,} {split}" for split, numbers in content.counts.items())
    epochs = result["steps"] / -(-result["train_examples"] // train["batch_size"])
    rate = f"{optim['learning_rate']:g}" + (f" (for a width of {optim['width']})" if optim["width"] else "")
    kept = f"step {result['selected_step']:,} of {result['steps']:,}"
    facts = [
        ("Model", f"{model['preset']}, weights {model['weights']}; head: {head}"),
        ("Data", f"{source}: {sizes}"),
        (
            "Training",
            f"{result['steps']:,} steps of {train['batch_size']} examples ({epochs:.3g} epochs), "
            f"{optim['name']}, learning rate {rate} {optim['schedule']}, seed {train['seed']}, "
            f"{train['precision']}",
        ),
        (
            "Kept",
            f"the parameters after {kept}" + (": the best on the held-out examples" * (train["select"] == "best")),
        ),
    ]
    if result.get("skipped_steps"):
        facts.append(("Skipped", f"{result['skipped_steps']:,} steps, whose loss or gradient was not finite"))
    facts += [
        ("Device", f"{result['device']} ({result['platform']}), host with {result['host_cores']} cores"),
        ("Memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB at most"),
        ("Time", f"{_duration(result['seconds_total'])}: {_times(result)}; finished {content.finished}"),
        (
            "Versions",
            f"Python {result['python']}, "
            + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        ),
    ]
    return facts


def _times(result: Mapping[str, Any]) -> str:
    parts = (("training", "train"), ("evaluation", "evaluate"), ("compilation", "compile"))
    return ", ".join(f"{name} {_duration(result[f'seconds_{field}'])}" for name, field in parts)


def _reported(content: Content, split: str, judged: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns (figure, ours, reported, difference)."""
    if not content.result["reported"]:  # of a thousand classes, to look among their figures takes seconds
        return []
    ours = metrics.flat({**content.result, **judged})
    rows = []
    for path, row in zip(content.result["reported"], terminal.beside_reported(content.result, judged), strict=True):
        theirs, found = content.result["reported"][path], ours.get(path)
        count = float(theirs).is_integer() and theirs > 1
        difference = "" if found is None else f"{found - theirs:+,.0f}" if count else f"{found - theirs:+.4f}"
        rows.append((*row, difference))
    return rows


def _confusion(content: Content) -> np.ndarray:
    names = np.arange(len(content.result["classes"]))
    return confusion_matrix(content.labels, content.likely.argmax(axis=-1), labels=names)


def _by_class(content: Content, judged: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns (class, examples, precision, recall, F1) of each class."""
    if content.labels is None:
        return []
    names = content.result["classes"]
    counts = np.bincount(content.labels, minlength=len(names))
    return [
        (name, f"{count:,}", *(f"{judged[figure][name]:.4f}" for figure in ("precision", "recall", "f1")))
        for name, count in zip(names, counts, strict=True)
    ]


def _confusions(content: Content) -> list[tuple[str, str, str, str]]:
    """Returns (true class, predicted class, examples, share of the true class) of the most frequent confusions."""
    names = content.result["classes"]
    if content.likely is None or len(names) < 3:
        return []
    matrix = _confusion(content)
    wrong = matrix - np.diag(np.diagonal(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(index), len(names)) for index in order]
    return [
        (names[true], names[taken], f"{wrong[true, taken]:,}", f"{wrong[true, taken] / matrix[true].sum():.1%}")
        for true, taken in pairs
        if wrong[true, taken]
    ]


def _curves(content: Content) -> list[Figure]:
    masked = content.result["held_out"].get("perplexity") is not None
    shown = [
        ("loss", "Loss", "mean cross-entropy (nats)", "Lower is better."),
        ("accuracy", "Accuracy", "share of answers that are right", "Higher is better."),
    ]
    if masked:
        shown.append(("perplexity", "Perplexity", "e to the power of the loss", "Of hidden word pieces; 1 is perfect."))
    return [
        figures.lines(field, title, curves, x_label="epochs", y_label=label, caption=_curve_note(caption, curves),
                      marked=_kept(content, field))
        for field, title, label, caption in shown
        if (curves := _curves_of(content, field))
    ]  # fmt: skip


def _curves_of(content: Content, field: str) -> list[Curve]:
    every = content.settings["train"]["log_every"]
    curves = []
    for split, label, style in (
        ("train_epoch", "training, mean of an epoch", "points"),
        ("train", f"training, mean of {every} steps", "faint"),
        ("eval", "held out", "points"),
    ):
        lines = [line for line in content.history if line["split"] == split]
        points = [(line["epoch"], value) for line in lines if math.isfinite(value := _value(line, field))]
        if points and (style != "faint" or len(points) > 2):
            curves.append(Curve(label, *zip(*points, strict=True), style))
    return curves


def _value(line: Mapping[str, Any], field: str) -> float:
    if field == "perplexity":  # of training steps it is not written down
        return math.exp(min(line.get("loss", math.nan), 700.0))
    return line.get(field, math.nan)


def _curve_note(caption: str, curves: Sequence[Curve]) -> str:
    if any("training" in curve.label for curve in curves):
        caption += " Training figures are taken while the parameters change, with dropout where the model has any."
    return caption


def _kept(content: Content, field: str) -> tuple[float, float, str] | None:
    if content.settings["train"]["select"] != "best":
        return None
    return content.result["selected_epoch"], content.result["held_out"][field], "kept"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes < 10 else f"{minutes} min"
