"""Measures what prediction costs beside its forward passes: reading, tokenising, sorting, writing; and its memory.

    python -m benchmarks.predict --weights-bert DIR --covid DIR                  # 2,000 tweets: that everything runs
    python -m benchmarks.predict --weights-bert DIR --covid DIR --texts 100000   # the figures
    python -m benchmarks.predict --run runs/reviews --file new.csv --texts 100000

Without --run, a run of `bert_covid_feature` on a few tweets is made first. The records of the file are repeated up to
the number of texts. Two processes, each `--repeat` times, one after the other, with compilation done and not counted:

predict  what `python -m jaxtl.predict RUN FILE --output=CSV` does, from opening the file to the last row written;
bare     the same texts tokenised, sorted and put into batches in advance; only the compiled forward passes are timed.

Aimed for: a ratio of 1.2 at most, and 2 GiB of memory.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.works import WORKS, experiment
from jaxtl import config, storage

_SMALL_RUN = ("data.train_size=64", "data.eval_size=32", "train.epochs=1", "train.eval_batch_size=64")
_RATIO, _MEMORY = 1.2, 2 * 2**30


def predict(run: Path, file: Path) -> dict[str, Any]:
    """Times the whole of prediction, as the command does it."""
    import jaxtl
    from jaxtl.data import inputs
    from jaxtl.evaluation import answers

    model = jaxtl.load(run)
    compiling = _compile(model, run)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with storage.written_whole(Path(folder) / "answers.csv") as out:
            rows = answers.Table(out, model.classifies, model.class_names, None)
            count = 0
            for origin, answer in model.answers(inputs.texts((), [file], model.text_column)):
                rows.write(origin, answer)
                count += 1
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "texts": count, "compiling": compiling, "peak_bytes": machine.peak_memory_bytes()}


def bare(run: Path, file: Path) -> dict[str, Any]:
    """Times the compiled forward passes alone, over the batches that prediction makes of the file."""
    import jax

    from jaxtl.data import buckets, records, tokens
    from jaxtl.evaluation.predict import WINDOW, batch_lengths
    from jaxtl.models import kernels, stages
    from jaxtl.training import step
    from jaxtl.training.network import TOKENIZER, load_run, run_params

    finished = load_run(run)
    data, size = finished.experiment.data, finished.experiment.train.eval_batch_size
    tokenizer, lengths = tokens.load_tokenizer(run / TOKENIZER), batch_lengths(data.max_length)
    texts = [text for _, text, _ in records.read(file, data.text_column) if text.strip()]
    batches = []
    for start in range(0, len(texts), WINDOW["texts"] * size):
        ids = tokens.tokenise(texts[start : start + WINDOW["texts"] * size], tokenizer, data.max_length)
        for rows, length in buckets.group(ids.lengths, lengths, size, None):
            full = np.resize(rows, size)
            batches.append(stages.Sequence(ids.padded(full, length), ids.lengths[full].astype(np.int32)))
    net, params = run_params(finished)
    params, forward = jax.device_put(params), step.forward(net.structure, step.unchanged)
    forward = jax.jit(forward, compiler_options=kernels.compiler_options(finished.experiment.train.precision))

    def passes(over: list[stages.Sequence]) -> float:
        started = time.perf_counter()
        sent = [forward(params, {}, {"input": jax.device_put(batch)}) for batch in over]
        jax.block_until_ready(sent)
        return time.perf_counter() - started

    compiling = passes(list({batch.values.shape[1]: batch for batch in batches}.values()))
    seconds = passes(batches)
    filled = sum(batch.lengths.sum() for batch in batches) / sum(batch.values.size for batch in batches)
    return {"seconds": seconds, "texts": len(texts), "compiling": compiling, "filled": float(filled)}


def _compile(model: Any, run: Path) -> float:
    """Has the model compile every shape that a long file needs, and returns the seconds."""
    from jaxtl.evaluation.predict import batch_lengths

    chosen = config.from_json((run / "experiment.json").read_text(encoding="utf-8"), str(run))
    started = time.perf_counter()
    for length in batch_lengths(chosen.data.max_length):
        model.predict(["a " * (length - 2)] * chosen.train.eval_batch_size)  # and the two special pieces
    return time.perf_counter() - started


def _file(folder: Path, source: Path, count: int) -> Path:
    """Writes a CSV file of `count` records: those of another, repeated."""
    with source.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    path = folder / "texts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *itertools.islice(itertools.cycle(rows), count)])
    return path


def _run(folder: Path, arguments: argparse.Namespace) -> Path:
    """Makes a run on a few tweets."""
    chosen = experiment(
        WORKS["text_feature_fc"],
        full=True,
        weights={"bert": arguments.weights_bert, "dinov2": "", "vgg19": ""},
        data={"covid": arguments.covid, "tfds": ""},
        assignments=[*_SMALL_RUN, f"train.precision={arguments.precision}"],
    )
    storage.write(folder / "experiment.json", config.to_json(chosen))
    run = folder / "run"
    command = ["jaxtl.main", f"--experiment={folder / 'experiment.json'}", f"--workdir={run}"]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return run


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--texts", type=int, default=2000, metavar="N", help="texts to predict; default: 2000")
    made.add_argument("--repeat", type=int, default=1, metavar="N", help="times each is measured; medians are shown")
    made.add_argument("--run", type=Path, help="a finished run on texts; default: one is made")
    made.add_argument("--file", type=Path, help="CSV file of texts; default: the tweets")
    made.add_argument("--weights-bert", default="", help="as model.weights; default: the experiment's")
    made.add_argument(
        "--covid", default="", metavar="DIR", help="folder with the tweets' training and validation files"
    )
    made.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the run that is made")
    made.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures to this file")
    made.add_argument("--only", nargs=3, metavar=("WHAT", "RUN", "FILE"), help=argparse.SUPPRESS)  # the processes
    return made


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and measures; returns the exit status."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.only:
        what, run, file = arguments.only
        print(json.dumps({"predict": predict, "bare": bare}[what](Path(run), Path(file))))
        return 0
    if not (arguments.file or arguments.covid):
        made.error("give --covid DIR, or --file CSV")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        file = _file(folder, arguments.file or Path(arguments.covid, "Constraint_Train.csv"), arguments.texts)
        run = arguments.run or _run(folder, arguments)
        found: dict[str, list[dict[str, Any]]] = {"predict": [], "bare": []}
        for _ in range(arguments.repeat):
            for what in found:
                command = [sys.executable, "-m", "benchmarks.predict", "--only", what, str(run), str(file)]
                ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[what].append(json.loads(ended.stdout.splitlines()[-1]))
    seconds = {what: statistics.median(one["seconds"] for one in runs) for what, runs in found.items()}
    figures = {
        "processor": machine.processor(),
        "texts": arguments.texts,
        "seconds": seconds,
        "ratio": seconds["predict"] / seconds["bare"],
        "texts_per_second": arguments.texts / seconds["predict"],
        "peak_bytes": max(one["peak_bytes"] for one in found["predict"]),
        "filled": found["bare"][0]["filled"],
        "runs": found,
    }
    if arguments.out:
        storage.write(arguments.out, json.dumps(figures, indent=2) + "\n")
    print(
        f"{arguments.texts:,} texts: {seconds['predict']:.1f} s, {figures['texts_per_second']:,.0f} texts/s; "
        f"bare forward passes {seconds['bare']:.1f} s, {figures['filled']:.0%} of their tokens are no padding\n"
        f"ratio {figures['ratio']:.3f} (aimed for: {_RATIO}), peak memory {figures['peak_bytes'] / 2**30:.2f} GiB "
        f"({_MEMORY / 2**30:.0f})\n{figures['processor']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
