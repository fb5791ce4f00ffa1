"""The comparison as tables on the screen.

python -m benchmarks.table FILE.json
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# heading: what is shown of the runs of one side
_COLUMNS = {
    "seconds": ("seconds", "{:,.1f}"),
    "compilation": ("seconds_compile", "{:,.1f}"),
    "total": ("seconds_total", "{:,.1f}"),
    "peer / jaxtl": ("ratio", "{:.2f}"),
    "examples/s": ("examples_per_second", "{:,.1f}"),
    "peak GiB": ("peak_memory_gib", "{:.2f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
}

_LEGEND = (
    "seconds: training, evaluation and jaxtl's filling of its activation cache, without compilation; total: with it. "
    "Loading libraries, weights and data, and tokenising, is not counted for either side. peer / jaxtl: ratio of the "
    "totals at the same precision. examples/s: training examples, times epochs, by seconds of training."
)
_SMALL = " Few examples: compilation weighs more than in real use; --full has the real sizes."


def medians(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each precision and side, in the order of their first runs; medians over the seeds.

    `ratio` is the side's total by jaxtl's at the same precision, None where jaxtl has none. A side of which every run
    failed has no figures.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["precision"], run["side"]), []).append(run)
    rows = []
    for (precision, side), found in groups.items():
        whole = [run for run in found if "error" not in run]
        row: dict[str, Any] = {"side": side, "precision": precision, "seeds": len(whole)}
        if whole:
            for name, _ in _COLUMNS.values():
                if name in whole[0]:
                    row[name] = statistics.median(run[name] for run in whole)
            row["peak_memory_gib"] = statistics.median(run["peak_memory_bytes"] for run in whole) / 2**30
        rows.append(row)
    ours = {row["precision"]: row.get("seconds_total") for row in rows if row["side"] == "jaxtl"}
    for row in rows:
        base = ours.get(row["precision"])
        row["ratio"] = row["seconds_total"] / base if base and "seconds_total" in row else None
    return rows


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a table for each work, what failed or is absent, and the hardware and versions."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    for name in dict.fromkeys(run["work"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["work"] == name]
        about = report["works"].get(name)
        title = name
        if about:
            train, held_out = about["examples"]
            title = f"{name}: {about['title']}; {train:,} examples, {held_out:,} held out, {about['epochs']} epochs"
        rows = medians(runs)
        seeds = max(row["seeds"] for row in rows)
        table = Table(title=title + (f"; medians over {seeds} seeds" if seeds > 1 else ""), title_justify="left")
        table.add_column("")
        table.add_column("precision")
        for heading in _COLUMNS:
            table.add_column(heading, justify="right")
        for row in rows:
            cells = [
                ("failed" if field == "seconds" else "") if row.get(field) is None else form.format(row[field])
                for field, form in _COLUMNS.values()
            ]
            table.add_row(row["side"], row["precision"], *cells)
        console.print(table)
        for run in runs:
            if "error" in run:
                what = f"{run['side']}, {run['precision']}, seed {run['seed']}, failed: {run['error']}"
                console.print(escape(what), soft_wrap=True)
        if about and about["random_weights"]:
            console.print("The weights are random: accuracy and loss mean nothing here.")
        console.print()
    for side, reason in report["absent"].items():
        console.print(escape(f"{side} was not measured: {reason}"), soft_wrap=True)
    console.print(_LEGEND + ("" if report["full"] else _SMALL))
    if report["set"]:
        console.print(escape(f"With --set {' --set '.join(report['set'])}"))
    console.print(escape(_hardware(report)))


def _hardware(report: Mapping[str, Any]) -> str:
    devices, versions = {}, {}
    for run in report["runs"]:
        if "error" not in run:
            devices[f"{run['side']} on {run['device']}"] = None
            versions |= run["versions"]
    parts = [
        report["processor"],
        ", ".join(devices),
        ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    return "; ".join(filter(None, parts))


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
