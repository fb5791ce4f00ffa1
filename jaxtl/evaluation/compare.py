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
    ("trained parameters", "trainable_parameters", "{:,.0f}"),
    ("of", "total_parameters", "{:,.0f}"),
    ("seconds an epoch", "seconds_per_epoch", "{:.2f}"),
    ("seconds in all", "seconds_total", "{:.1f}"),
)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> None:
    """Prints a table; the first column is never wrapped, and with `numbers` the others are aligned on the right."""
    table = Table(*headings, header_style="bold")
    table.columns[0].no_wrap = True
    for column in table.columns[1:] if numbers else ():
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def show_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the results of several runs, one a row."""
    rows = [(name, *(form.format(result[field]) for _, field, form in _COLUMNS)) for name, result in results.items()]
    show(["run", *(heading for heading, _, _ in _COLUMNS)], rows, numbers=True)


def show_result(result: Mapping[str, Any], workdir: Path, *, new: bool) -> None:
    """Prints the result of one run, beside the reported figures where there are some."""
    reported = result["reported"]
    rows = [
        (heading, form.format(result[field]), form.format(reported[field]) if field in reported else "")
        for heading, field, form in _COLUMNS
    ]
    columns = 3 if reported else 2
    show(["", "this run", "reported"][:columns], [row[:columns] for row in rows], numbers=True)
    _console().print(f"{'' if new else 'finished before; '}{workdir / 'result.json'}", soft_wrap=True)


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    # Piped, rich assumes 80 columns: too few for these tables.
    return console if console.is_terminal else Console(highlight=False, markup=False, width=140)
