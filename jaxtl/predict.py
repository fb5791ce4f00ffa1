"""Says what finished runs make of new texts or images.

    python -m jaxtl.predict runs/reviews --text "Arrived broken, but the service was kind."
    python -m jaxtl.predict runs/reviews new.csv more.jsonl --output=answers.csv
    python -m jaxtl.predict runs/pets cat.jpg photos/ --output=answers.jsonl --top=3
    python -m jaxtl.predict runs/vit runs/dinov2 runs/vgg photos/ --ensemble=vote

Run folders come first (`gs://BUCKET/RUN` is fetched), then inputs: of runs on texts CSV, TSV, JSON lines, Parquet or
.txt files, of runs on images image files and folders of them. Several runs answer together. Every input is one row,
with its label and probabilities; one that cannot be read is a row with an error. --output is CSV or JSON lines, by its
suffix, and is written whole or not at all; without it, CSV goes to standard output.

Exit status: 0; 1 if some rows have errors; 2 if the command is mistaken, and nothing was written. docs/predict.md tells
more.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

import jaxtl
from jaxtl.cli import guarded, parser, quiet_libraries
from jaxtl.errors import UserError

if TYPE_CHECKING:
    from jaxtl.data.inputs import Origin
    from jaxtl.evaluation.answers import Lines, Table
    from jaxtl.evaluation.predict import Predictor
    from jaxtl.progress import Bar

_TEXT = flags.DEFINE_multi_string("text", [], "A text to classify; repeat for more.")
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "The file to write: .csv, or .jsonl for JSON lines. Default: CSV on standard output.",
    allow_override=True,  # see jaxtl.compare
)
_TOP = flags.DEFINE_integer(
    "top", None, "Write the K likeliest classes of each input. Default: all, or 5 where there are more than 20."
)
_ENSEMBLE = flags.DEFINE_enum(
    "ensemble",
    None,
    ["mean", "vote"],
    "How several runs answer together: by the mean of their probabilities, which is the default; or by a vote, ties by "
    "the mean.",
    allow_override=True,
)
_COLUMN = flags.DEFINE_string("text_column", None, "The column that holds the texts. Default: as in training.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Inputs that the device takes at once. Default: as in the run, train.eval_batch_size."
)


def run(argv: list[str]) -> None:
    """Does what the command line says; raises UserError for what the user can mend."""
    from jaxtl import remote

    folders, paths = _divided([remote.local(argument, without=["checkpoints"]) for argument in argv[1:]])
    output = _checked(folders, paths)
    # Slow imports come after the command line has been read.
    from jaxtl.data import folder, inputs
    from jaxtl.evaluation import answers
    from jaxtl.progress import Bar, say
    from jaxtl.storage import written_whole

    quiet_libraries()
    with contextlib.ExitStack() as opened:
        file = sys.stdout
        if output:  # before the work is done
            file = opened.enter_context(written_whole(output))
        elif file.isatty():
            file.reconfigure(errors="replace")  # a terminal may not have every character
        else:
            file.reconfigure(encoding="utf-8", newline="")
        model = jaxtl.load(folders, ensemble=_ENSEMBLE.value or "mean", batch_size=_BATCH_SIZE.value)
        names, total = ", ".join(map(str, folders)), None
        if model.classifies == "images":
            if _TEXT.value or _COLUMN.value:
                raise UserError(f"{names} classifies images: --text and --text_column are for runs on texts")
            inputs.check(paths, "images", names, "")
            if others := folder.left_out(path for path in paths if path.is_dir()):
                say(f"left out, not being images that are read: {others}")
            total = sum(1 for _ in inputs.images(paths))
            pairs = inputs.images(paths)
        else:
            column = _COLUMN.value or model.text_column
            inputs.check(paths, "texts", names, column)
            pairs = inputs.texts(_TEXT.value, paths, column)
        top = answers.shown(_TOP.value, len(model.class_names))
        if output and output.suffix.lower() != ".csv":
            rows = answers.Lines(file, model.classifies)
        else:
            rows = answers.Table(file, model.classifies, model.class_names, top)
        # On a terminal the rows themselves show how far it has come, and a bar would run through them.
        bar = Bar("predicting", total) if output or not sys.stdout.isatty() else None
        count, faults = _write(model, pairs, rows, top, bar)
    with_errors = f", {faults:,} of them with an error" if faults else ""
    if output or faults:
        print(f"{count:,} {model.classifies}{with_errors}: {output or 'above'}", file=sys.stderr)
    if faults:
        sys.exit(1)


def _divided(arguments: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Returns the run folders, which come first, and the inputs."""
    try:
        is_run = [(path / "experiment.json").is_file() for path in arguments]
    except OSError as error:
        raise UserError(
            f"{Path(error.filename).parts[0][:40]}..: {error.strerror}; a text itself is given with --text"
        ) from None
    count = is_run.index(False) if False in is_run else len(is_run)
    if not arguments:
        raise UserError('give a run folder and inputs, as in `RUN tweets.csv`, `RUN photos/` or `RUN --text "..."`')
    if not count:
        jaxtl.load(arguments[0])  # raises what is wrong with it
    if late := [path for path, run in zip(arguments[count:], is_run[count:], strict=True) if run]:
        raise UserError(f"{late[0]} is a run folder, and {arguments[count]} before it is none: give the runs first")
    return list(arguments[:count]), list(arguments[count:])


def _checked(folders: Sequence[Path], paths: Sequence[Path]) -> Path | None:
    """Looks at what can be told before anything is loaded; returns the path of the output."""
    if not paths and not _TEXT.value:
        raise UserError(
            f'there is nothing to predict: give files or folders, as in `{folders[-1]} tweets.csv`, or --text "..."'
        )
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no file {path}" + "; a text itself is given with --text" * (" " in path.name))
    if _ENSEMBLE.value and len(folders) < 2:
        raise UserError(f"--ensemble={_ENSEMBLE.value} puts several runs together: give two or more, or leave it out")
    if _TOP.value is not None and _TOP.value < 1:
        raise UserError(f"--top={_TOP.value}: at least one class is written")
    if not _OUTPUT.value:
        return None
    output = Path(_OUTPUT.value).expanduser()
    if output.suffix.lower() not in (".csv", ".jsonl", ".json"):
        raise UserError(f"--output={output}: its name ends in .csv, or in .jsonl for JSON lines")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}; make it first")
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise UserError(f"--output={output} is one of the inputs: name another file")
    return output


def _write(
    model: "Predictor",
    pairs: "Iterable[tuple[Origin, object]]",
    rows: "Table | Lines",
    top: int | None,
    bar: "Bar | None",
) -> tuple[int, int]:
    """Writes a row for every input; returns their number, and that of the errors."""
    count = faults = done = 0
    started = time.monotonic()

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if bar:
            bar.advance(more, f"{done / (time.monotonic() - started):,.1f} {model.classifies}/s")

    with bar or contextlib.nullcontext():
        for origin, answer in model.answers(pairs, top, advance):
            rows.write(origin, answer)
            count += 1
            faults += bool(answer.error)
    return count, faults


def main(argv: list[str]) -> None:
    """Runs; see `jaxtl.cli`."""
    again = f"{_OUTPUT.value} was not written" if _OUTPUT.value else "not all inputs were answered"
    guarded(run, argv, again, "lower --batch_size")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(sys.modules[__name__]))
