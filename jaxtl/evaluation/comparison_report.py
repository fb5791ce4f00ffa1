"""A comparison for people: tables on the terminal, and a page."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jaxtl import remote, storage
from jaxtl.evaluation import comparison, ensemble, figures, pages, terminal
from jaxtl.evaluation.comparison import Comparison, Figure, Pool, Row
from jaxtl.evaluation.runs import Run
from jaxtl.training.run import REPORT

PAGE = "compare.html"
INTERVALS = (
    "In brackets: 95 % intervals, of a single run by the bootstrap over the examples that it was judged on, of several "
    "seeds by Student's t over these."
)
# Heading, path of the figure, format; on the terminal there is room for some.
_QUALITY = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("loss", "loss", "{:.4f}"),
    ("macro F1", "f1_macro", "{:.4f}"),
    ("weighted F1", "f1_weighted", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
)
_MORE_QUALITY = (
    ("held-out accuracy", "held_out_accuracy", "{:.4f}"),
    ("training accuracy", "train_accuracy", "{:.4f}"),
    ("training loss", "train_loss", "{:.4f}"),
)
_COSTS = (
    ("trained parameters", "trainable_parameters", "{:,.0f}"),
    ("of", "total_parameters", "{:,.0f}"),
    ("seconds an epoch", "seconds_per_epoch", "{:,.2f}"),
    ("seconds in all", "seconds_total", "{:,.1f}"),
    ("examples a second", "examples_per_second", "{:,.1f}"),
    ("peak memory, GB", "peak_memory_bytes", "{:,.2f}"),
)
_UNITS = {"peak_memory_bytes": 1e9}
_ESTIMATES = (
    ("accuracy", "Accuracy", "share of answers that are right"),
    ("loss", "Loss", "mean cross-entropy (nats)"),
)
_CURVES = (
    ("eval", "accuracy", "Held-out accuracy", "share of answers that are right"),
    ("train_epoch", "accuracy", "Training accuracy", "share of answers that are right"),
    ("eval", "loss", "Held-out loss", "mean cross-entropy (nats)"),
    ("train_epoch", "loss", "Training loss", "mean cross-entropy (nats)"),
)
_FEW_CLASSES = 3  # whose F1 has columns of its own in the table of results
_MOST_MATRIX = 20  # classes of a confusion matrix
_MOST_PAIRS = 30  # on the terminal
_ROWS = 50  # of a list in the page, until more are asked for
_SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        small: below it: the interval of a number, and its range over several seeds.
        sort: what the column is sorted by, where that is not the text.
        link: a page that the text leads to.
    """

    text: str
    small: tuple[str, ...] = ()
    sort: str = ""
    link: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: heading, and `text` or `number`.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that stand beside each other: those judged on the same examples, or those whose answers are not known.

    Attributes:
        heading: what they were judged on.
    """

    heading: str
    rows: tuple[Row, ...]
    pool: Pool | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the rows; empty where they are not known."""
        return self.pool.class_names if self.pool else ()


def present(finished: Sequence[Run], page: Path, rule: ensemble.Rule | None = None) -> None:
    """Compares runs, writes the page, and prints the tables and where the page is.

    Raises:
        UserError: the page cannot be written.
    """
    found = comparison.illustrated(comparison.compare(finished, rule))
    write(page, found)
    show(found)
    terminal.line(remote.shown(page))


def groups(found: Comparison) -> list[Group]:
    """Returns the rows of a comparison, grouped."""
    by_name = {row.name: row for row in found.rows}
    grouped = [Group(pool.heading, tuple(by_name.pop(name) for name in pool.rows), pool) for pool in found.pools]
    return grouped + ([Group("answers to single examples not kept", tuple(by_name.values()), None)] if by_name else [])


def show(found: Comparison) -> None:
    """Prints the tables of a comparison."""
    for group in groups(found):
        terminal.line(f"\nJudged on {group.heading}:")
        _print(results(group))
    _print(costs(found))
    reported = beside_reported(found)
    if reported.rows:
        _print(reported)
    for pool in found.pools:
        if pool.pairs:
            table = pairs(pool)
            if len(found.pools) > 1:
                terminal.line(f"\nJudged on {pool.heading}:")
            brief = tuple((*row[:2], Cell(row[2].text), *row[3:7]) for row in table.rows[:_MOST_PAIRS])
            _print(Table(table.columns[:7], brief))
            if len(table.rows) > _MOST_PAIRS:
                terminal.line(f"{len(table.rows) - _MOST_PAIRS} pairs more, with larger p, are in the page.")
    if any(pool.pairs for pool in found.pools):
        terminal.line(
            "p: McNemar's exact test, whether both are equally likely to be the only one right; (Holm): corrected for "
            "the number of pairs."
        )
    terminal.line(INTERVALS)
    for note in found.notes:
        terminal.line(note)


def _print(table: Table) -> None:
    rows = [["\n".join((cell.text, *cell.small[:1])) for cell in row] for row in table.rows]
    names = sum(kind == "text" for _, kind in table.columns[:2])
    terminal.show([heading for heading, _ in table.columns], rows, numbers=True, names=names)


def write(path: Path, found: Comparison) -> None:
    """Writes the page of a comparison; links in it lead from its folder to the runs' reports.

    Raises:
        UserError: that cannot be done.
    """
    storage.write(path, render(found, path.parent))


def render(found: Comparison, folder: Path) -> str:
    """Returns the page, which is to lie in `folder`."""
    shown = groups(found)
    return pages.render(
        "compare.html.j2",
        it=found,
        groups=shown,
        tiles=_tiles(found, shown),
        results=[results(group, folder) for group in shown],
        estimates=[_estimates(group, number) for number, group in enumerate(shown)],
        curves=[_curve_figures(group, number) for number, group in enumerate(shown)],
        matrices=[_matrices(group, number) for number, group in enumerate(shown)],
        by_class=[by_class(group) for group in shown],
        pairs=[pairs(group.pool) if group.pool else None for group in shown],
        wrong=[_wrong(group.pool) if group.pool else "" for group in shown],
        reported=beside_reported(found),
        costs=costs(found),
        rows=_ROWS,
        significant=_SIGNIFICANT,
        intervals=INTERVALS,
    )


# --- tables ------------------------------------------------------------------------------------------------


def results(group: Group, folder: Path | None = None) -> Table:
    """Returns the table of how well rows do; for a page in `folder` with all that there is room for there."""
    few = group.class_names if len(group.class_names) <= _FEW_CLASSES else ()
    classes = tuple((f"F1 of {name}", f"f1/{name}", "{:.4f}") for name in few)
    columns = (*_QUALITY, *classes, *(_MORE_QUALITY if folder else ()))
    return _table(group.rows, columns, folder)


def costs(found: Comparison) -> Table:
    """Returns the table of what the rows took."""
    return _table([row for row in found.rows if row.rule is None], _COSTS)


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]], folder: Path | None = None) -> Table:
    shown = [column for column in columns if any(column[1] in row.figures for row in rows)]
    seeds = any(len(row.runs) > 1 and row.rule is None for row in rows)
    headings = ("run", "text"), *[("seeds", "number")] * seeds, *((heading, "number") for heading, _, _ in shown)

    def cells(row: Row) -> Iterator[Cell]:
        yield Cell(row.name, link=_report(row, folder))
        if seeds:
            yield Cell("" if row.rule else str(len(row.runs)))
        for _, path, form in shown:
            yield _cell(row.figures.get(path), form, _UNITS.get(path, 1.0), timed=columns is _COSTS)

    return Table(headings, tuple(tuple(cells(row)) for row in rows))


def by_class(group: Group) -> Table | None:
    """Returns F1 of each class, where that is not in the table of results already."""
    if len(group.class_names) <= _FEW_CLASSES:
        return None
    columns = ("class", "text"), *((row.name, "number") for row in group.rows)
    rows = tuple(
        (Cell(name), *(_cell(row.figures.get(f"f1/{name}"), "{:.4f}") for row in group.rows))
        for name in group.class_names
    )
    return Table(columns, rows)


def beside_reported(found: Comparison) -> Table:
    """Returns the table of every figure that was reported of a row's model, but for confusion matrices."""
    columns = ("run", "text"), ("figure", "text"), ("these runs", "number"), ("reported", "number")
    rows = tuple(
        (Cell(row.name), *_beside(path, theirs, row.figures.get(path)))
        for row in found.rows
        for path, theirs in _reported(row).items()
        if path.partition("/")[0] != "confusion"
    )
    return Table((*columns, ("difference", "number"), ("in our interval", "text")), rows)


def _reported(row: Row) -> Mapping[str, float]:
    return {} if row.rule else dict(row.runs[0].experiment.reported)


def _beside(path: str, theirs: float, ours: Figure | None) -> Iterator[Cell]:
    counted = theirs > 1 and float(theirs).is_integer()
    digits = ",.0f" if counted else ".4f"
    yield Cell(path.replace("/", " of ").replace("_", " "))
    yield _cell(ours, f"{{:{digits}}}", timed=counted)
    yield Cell(f"{theirs:{digits}}", sort=repr(theirs))
    yield Cell(f"{ours.value - theirs:+{digits}}" if ours else "")
    if counted or ours is None or ours.interval is None:
        yield Cell("")
    else:
        yield Cell("yes" if ours.interval.low <= theirs <= ours.interval.high else "no")


def pairs(pool: Pool) -> Table:
    """Returns the table of the tests of every two rows, the smallest p first."""
    columns = ("more accurate", "text"), ("less accurate", "text"), ("difference", "number")
    counts = ("only 1st right", "number"), ("only 2nd right", "number")
    rows = tuple(
        (
            Cell(pair.first),
            Cell(pair.second),
            _cell(pair.difference, "{:.4f}"),
            Cell(f"{pair.test.first:,}"),
            Cell(f"{pair.test.second:,}"),
            _p(pair.test.p),
            _p(pair.adjusted),
            Cell("yes" if pair.adjusted < _SIGNIFICANT else "not shown"),
        )
        for pair in sorted(pool.pairs, key=lambda pair: pair.test.p)
    )
    return Table((*columns, *counts, ("p", "number"), ("p (Holm)", "number"), ("better", "text")), rows)


def _cell(figure: Figure | None, form: str, unit: float = 1.0, timed: bool = False) -> Cell:
    """Returns the cell of a figure; what is counted or timed has a range, and no interval."""
    if figure is None:
        return Cell("")
    small = []
    if figure.interval and not timed:
        small.append(f"[{form.format(figure.interval.low / unit)}, {form.format(figure.interval.high / unit)}]")
    if figure.spread and figure.spread[0] < figure.spread[1]:
        small.append(f"{form.format(figure.spread[0] / unit)} to {form.format(figure.spread[1] / unit)}")
    return Cell(form.format(figure.value / unit), tuple(small), repr(figure.value))


def _p(value: float) -> Cell:
    return Cell(f"{value:.4f}" if value >= 0.0001 else f"{value:.0e}", sort=repr(value))


def _report(row: Row, folder: Path | None) -> str:
    """Returns the address of the report of a row's first run, relative to a folder; empty where there is none."""
    page = row.runs[0].folder / REPORT / "index.html"
    if folder is None or row.rule or not page.is_file():
        return ""
    return quote(os.path.relpath(page.absolute(), folder.absolute()).replace(os.sep, "/"))


def _wrong(pool: Pool) -> str:
    """Returns in words how many examples are right in how many runs."""
    every, none = pool.wrong.get(0, 0), pool.wrong.get(pool.runs, 0)
    numbers = [f"{count:,} ({count / pool.examples:.1%})" for count in (every, pool.examples - every - none, none)]
    if pool.runs == 1:
        return f"{numbers[0]} of {pool.examples:,} examples are right."
    every, some, none = numbers
    return f"{every} of {pool.examples:,} examples are right in all {pool.runs} runs, {some} in some, {none} in none."


def _tiles(found: Comparison, shown: Sequence[Group]) -> list[tuple[str, str, str]]:
    """Returns (what, figure, note) of what one looks for first."""
    rows = [row for row in found.rows if row.rule is None]
    runs = sum(len(row.runs) for row in rows)
    tiles = [("Runs", f"{runs:,}", f"of {len(rows):,} experiments" if runs > len(rows) else "")]
    for group in [group for group in shown if group.pool][:3]:
        best = max(group.rows, key=lambda row: row.figures["accuracy"].value)
        tiles.append(("Best accuracy", f"{best.figures['accuracy'].value:.4f}", f"{best.name}, on {group.heading}"))
        if group.pool.runs > 1:
            note = f"of the {group.pool.examples:,} examples"
            tiles.append(("Wrong in every run", f"{group.pool.wrong.get(group.pool.runs, 0):,}", note))
    return tiles


# --- figures -----------------------------------------------------------------------------------------------


def _estimates(group: Group, number: int) -> list[figures.Figure]:
    drawn = []
    for path, title, label in _ESTIMATES:
        found = {row.name: row.figures[path] for row in group.rows if path in row.figures}
        reported = {row.name: float(_reported(row)[path]) for row in group.rows if path in _reported(row)}
        if found:
            drawn.append(
                figures.intervals(
                    f"{path}_{number}",
                    title,
                    {name: (figure.value, figure.interval) for name, figure in found.items()},
                    x_label=label,
                    caption="Lines are 95 % intervals." if any(figure.interval for figure in found.values()) else "",
                    reported=reported,
                )
            )
    return drawn


def _curve_figures(group: Group, number: int) -> list[figures.Figure]:
    return [
        figures.lines(f"{split}_{path}_{number}", title, curves, x_label="epochs", y_label=label, caption="")
        for split, path, title, label in _CURVES
        if (curves := list(_curves(group.rows, split, path)))
    ]


def _curves(rows: Sequence[Row], split: str, path: str) -> Iterator[figures.Curve]:
    """Yields the curve of every row; of several seeds their mean, and each of them in the background."""
    for row in rows:
        lines = [] if row.rule else [_points(run.history, split, path) for run in row.runs]
        epochs = sorted(set.intersection(*map(set, lines))) if lines else []
        if epochs:
            means = [float(np.mean([points[epoch] for points in lines])) for epoch in epochs]
            yield figures.Curve(row.name, epochs, means, "points" if len(epochs) < 20 else "line")
            for points in lines if len(lines) > 1 else ():
                yield figures.Curve("", list(points), list(points.values()), "faint")


def _points(history: Sequence[Mapping[str, Any]], split: str, path: str) -> dict[float, float]:
    """Returns a figure by epoch."""
    return {
        line["epoch"]: line[path]
        for line in history
        if line["split"] == split and all(_finite(line.get(name)) for name in ("epoch", path))
    }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _matrices(group: Group, number: int) -> list[list[figures.Figure]]:
    """Returns the confusion matrix of every row, and that which was reported; those to stand side by side together."""
    names, by_row = group.class_names, []
    for index, row in enumerate(group.rows if 0 < len(names) <= _MOST_MATRIX else ()):
        by_row.append([])
        ours = {path: figure.value for path, figure in row.figures.items()}
        for values, whose in ((ours, "ours"), (_reported(row), "reported")):
            matrix = [[values.get(f"confusion/{true}/{name}") for name in names] for true in names]
            if all(count is not None for line in matrix for count in line):
                counts = np.round(np.array(matrix, float)).astype(int)
                drawn = figures.confusion(counts, names, whose, f"confusion_{number}_{index}_{whose}")
                by_row[-1].append(dataclasses.replace(drawn, caption=row.name))
    if any(len(found) > 1 for found in by_row):
        return by_row
    return [[figure for found in by_row for figure in found]] if by_row else []
