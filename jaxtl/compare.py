"""Compares finished runs: a table on the terminal, and a page.

    python -m jaxtl.compare runs/*
    python -m jaxtl.compare runs/covid --output=covid.html --ensemble=mean

The folders are those of runs, or hold runs, as that of a suite does; `gs://BUCKET/RUNS` is fetched. Shown are accuracy,
F1 and loss with 95 % intervals (bootstrap over the examples), parameters, time and memory, learning curves, reported
figures, and what most runs get wrong. Runs that differ by their seed alone are one row: the mean, and an interval over
the seeds. Runs that were judged on the same examples are tested against each other (McNemar's exact test, with Holm's
correction).

Runs that have not finished and folders that hold none are left out, and named.
"""

import sys
from pathlib import Path

from absl import app, flags

from jaxtl.cli import guarded, parser, quiet_libraries
from jaxtl.errors import UserError

# Other commands have flags of these names too; a process has one command, but for the tests'.
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "The page to write: one file, which needs no network. Default: compare.html.",
    allow_override=True,
)
_ENSEMBLE = flags.DEFINE_enum(
    "ensemble",
    None,
    ["mean", "vote"],
    "Add the ensemble of all runs that were judged on the same examples: by the mean of their probabilities, or by "
    "vote. Default: none.",
    allow_override=True,
)


def run(argv: list[str]) -> None:
    """Does what the command line says; raises UserError for what the user can mend."""
    if len(argv) < 2:
        raise UserError("give the folders of finished runs, as in `python -m jaxtl.compare runs/*`")
    # Slow imports come after the command line has been read.
    from jaxtl import remote
    from jaxtl.evaluation import comparison_report, runs
    from jaxtl.progress import say

    quiet_libraries()
    output = Path(_OUTPUT.value or comparison_report.PAGE).expanduser()
    if not output.absolute().parent.is_dir():  # before the work is done
        raise UserError(f"--output={output}: there is no folder {output.parent}")
    found, left_out = runs.read([folder for name in argv[1:] for folder in remote.found(name)])
    for line in left_out:
        say(f"left out: {line}")
    comparison_report.present(found, output, _ENSEMBLE.value)


def main(argv: list[str]) -> None:
    """Runs; see `jaxtl.cli`."""
    guarded(run, argv, "nothing was changed")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(sys.modules[__name__]))
