"""Tables on the terminal, and the result of one run. On standard output, for people and for `tee`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtl import remote
from jaxtl.evaluation import metrics

# What is shown of result.json beside the judged split: heading, field, format.
_COLUMNS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("loss", "loss", "{:.4f}"),
    ("train loss", "train_loss", "{:.4f}"),
    ("trained parameters", "trainable_parameters", "{:,.0f}"),
    ("of", "total_parameters", "{:,.0f}"),
    ("seconds an epoch", "seconds_per_epoch", "{:.2f}"),
    ("seconds in all", "seconds_total", "{:.1f}"),
)
# Of the judged split: heading, field, format.
_JUDGED = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("ROC-AUC", "roc_auc", "{:.4f}"),
)
_BY_CLASS = ("precision", "recall", "f1")
_MANY_CLASSES = 20  # more would not fit beside each other


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False, names: int = 1) -> None:
    """Prints a table; its first `names` columns are never wrapped, with `numbers` the others are aligned right."""
    table = Table(*headings, header_style="bold")
    for column in table.columns[:names]:
        column.no_wrap = True
    for column in table.columns[names:] if numbers else ():
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def line(text: str) -> None:
    """Prints text, which the terminal wraps."""
    _console().print(text, soft_wrap=True)


def show_result(result: Mapping[str, Any], workdir: Path, *, new: bool) -> None:
    """Prints the result of one run, beside the reported figures where there are some; its report's path comes last."""
    split, judged = judged_split(result)
    show_metrics(judged, split)
    if result["reported"]:
        show(("figure", split, "reported"), beside_reported(result, judged), numbers=True)
    rows = [
        (heading, form.format(result[field]))
        for heading, field, form in _COLUMNS
        if field in result and field not in judged
    ]
    if result.get("before"):
        before = ", ".join(f"{name} {value:.4f}" for name, value in result["before"].items())
        rows.insert(0, ("held out, before training", before))
    if split == "test":
        rows.insert(0, ("held-out accuracy", f"{result['accuracy']:.4f}"))
        rows.insert(1, ("held-out loss", f"{result['loss']:.4f}"))
    show(("this run", ""), rows, numbers=True)
    line(f"{'' if new else 'finished before; '}{remote.shown(workdir / 'result.json')}")
    page = workdir / "report" / "index.html"
    if page.is_file():  # it is said where it could not be written
        line(remote.shown(page))


def show_metrics(found: Mapping[str, Any], split: str) -> None:
    """Prints what was measured on a split: single figures, figures by class, the confusion matrix.

    Args:
        found: see `metrics.classification`.
        split: its name, for the heading.
    """
    rows = [(heading, form.format(found[field])) for heading, field, form in _JUDGED if found.get(field) is not None]
    show((split, ""), rows, numbers=True)
    names = list(found.get("confusion", ()))
    if 0 < len(names) <= _MANY_CLASSES:
        table = [
            (
                name,
                *(f"{found[figure][name]:.4f}" for figure in _BY_CLASS),
                *map(str, found["confusion"][name].values()),
            )
            for name in names
        ]
        table += [
            (average, *(f"{found[f'{figure}_{average}']:.4f}" for figure in _BY_CLASS), *([""] * len(names)))
            for average in ("macro", "weighted")
        ]
        show(("true class", *_BY_CLASS, *(f"-> {name}" for name in names)), table, numbers=True)


def judged_split(result: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Returns the split that the run is judged by, and what was measured on it."""
    return ("test", result["test"]) if result.get("test") else ("held out", result["held_out"])


def beside_reported(result: Mapping[str, Any], judged: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (figure, ours, reported) of every figure that is reported."""
    ours = metrics.flat({**result, **judged})
    rows = []
    for path, value in result["reported"].items():
        form = "{:,.0f}" if value > 1 and float(value).is_integer() else "{:.4f}"  # a count, or a share
        kind, *names = path.split("/")
        rows.append((" ".join((kind, " -> ".join(names))).strip(), _cell(ours, path, form), form.format(value)))
    return rows


def _cell(figures: Mapping[str, Any], field: str, form: str) -> str:
    value = figures.get(field)
    return "" if value is None else form.format(value)


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    # Piped, rich assumes 80 columns: too few for these tables.
    return console if console.is_terminal else Console(highlight=False, markup=False, width=140)
