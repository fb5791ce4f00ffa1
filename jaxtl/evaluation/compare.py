"""Results on the terminal: one run, or several side by side. On standard output, for people and for `tee`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# What a comparison shows of result.json: heading, field, format.
_COLUMNS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("loss", "loss", "{:.4f}"),
    ("train loss", "train_loss", "{:.4f}"),
    ("trained parameters", "trainable_parameters", "{:,}"),
    ("of", "total_parameters", "{:,}"),
    ("seconds an epoch", "seconds_per_epoch", "{:.2f}"),
    ("seconds in all", "seconds_total", "{:.1f}"),
)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table of text; the first column is never wrapped."""
    table = Table(*headings, header_style="bold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def show_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the results of several runs, one a row."""
    table = Table("run", header_style="bold")
    table.columns[0].no_wrap = True
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(name, *(form.format(result[field]) for _, field, form in _COLUMNS))
    _console().print(table)


def show_result(result: Mapping[str, Any], workdir: Path, *, new: bool) -> None:
    """Prints the result of one run, beside the reported figures where there are some."""
    reported = result["reported"]
    table = Table("", header_style="bold")
    table.add_column("this run", justify="right")
    if reported:
        table.add_column("reported", justify="right")
    for heading, field, form in _COLUMNS:
        cells = [form.format(result[field])]
        if reported:
            cells.append(form.format(reported[field]) if field in reported else "")
        table.add_row(heading, *cells)
    console = _console()
    console.print(table)
    console.print(f"{'' if new else 'finished before; '}{workdir / 'result.json'}")


def _console() -> Console:
    console = Console(highlight=False)
    # Piped, rich assumes 80 columns: too few for these tables.
    return console if console.is_terminal else Console(highlight=False, width=140)
