"""Says what a finished run makes of new texts.

    python -m jaxtl.predict runs/text_csv --text "Drinking hot water cures the virus."
    python -m jaxtl.predict runs/text_csv tweets.csv --output answers.csv

Texts are read from CSV, TSV, JSON lines, Parquet or .txt files, and answered with the label and its probability.
"""

import sys
from pathlib import Path

from absl import app, flags

from jaxtl.cli import guarded, parser, quiet_libraries
from jaxtl.errors import UserError

_TEXT = flags.DEFINE_multi_string("text", [], "A text to classify; repeat for more.")
_OUTPUT = flags.DEFINE_string("output", None, "The CSV file to write. Default: standard output.")
_COLUMN = flags.DEFINE_string("text_column", None, "The column that holds the texts. Default: as in training.")


def run(argv: list[str]) -> None:
    """Does what the command line says; raises UserError for what the user can mend."""
    if len(argv) < 2 or len(argv) > 3 or (len(argv) == 3) == bool(_TEXT.value):
        raise UserError('give a run folder and a file, as in `RUN tweets.csv`, or texts, as in `RUN --text "..."`')
    # Slow imports come after the command line has been read.
    from jaxtl.data import text
    from jaxtl.evaluation import predict
    from jaxtl.storage import written_whole

    quiet_libraries()
    source = Path(argv[2]).expanduser() if len(argv) == 3 else None
    if source and not source.is_file():
        raise UserError(f"there is no file {source}")
    model = predict.TextClassifier(Path(argv[1]).expanduser())
    if source:
        column = _COLUMN.value or model.data.text_column
        records = ((number, string) for number, string, _ in text.records(source, column))
    else:
        records = enumerate(_TEXT.value, 1)
    answers = model.stream(records)
    if not _OUTPUT.value:
        predict.write(answers, model.class_names, sys.stdout)
        return
    with written_whole(Path(_OUTPUT.value).expanduser()) as file:
        count = predict.write(answers, model.class_names, file)
    print(f"{count:,} texts: {_OUTPUT.value}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Runs; see `jaxtl.cli`."""
    guarded(run, argv, "not all texts were answered")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(sys.modules[__name__]))
