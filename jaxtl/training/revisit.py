"""A finished run, evaluated on other examples than it was judged by."""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtl import config, remote, storage
from jaxtl.config import Images, Text
from jaxtl.data import sources, text, tokens
from jaxtl.errors import UserError
from jaxtl.evaluation import predictions
from jaxtl.progress import say, track
from jaxtl.training import freeze, run
from jaxtl.training.evaluate import evaluator, preparation
from jaxtl.training.network import TOKENIZER, load_run, run_params
from jaxtl.training.setup import batch_lengths, describe

FOLDER = "evaluations"
# Settings that do not make it another model; of the data, those do that say what the numbers of the classes mean.
_FREE = ("data.", "train.eval_batch_size", "train.precision")
# That say which examples are meant: evaluations of others lie beside each other.
_FILES = ("dir", "name", "test", "eval_split")
_FIXED = ("data.classes", "data.tokenizer")


def evaluate(folder: Path, assignments: Sequence[str]) -> tuple[dict[str, Any], str, Path]:
    """Evaluates a finished run; writes the figures, and a table of the answers, into its folder `evaluations`.

    Args:
        folder: of the run.
        assignments: `path.to.field=value`; of a text run `data.test=FILE` names the file, relative to the current
            folder, or to `data.dir` where that is given too. Without: what the run was judged by, or, of images, the
            held-out split that `data` describes.

    Returns:
        The figures, the name of the split, and where they were written.

    Raises:
        UserError: there is no finished run, or something is wrong with the data.
    """
    finished = load_run(folder)
    experiment = config.override(finished.experiment, assignments)
    config.validate(experiment)
    changed = config.differences(finished.experiment, experiment)
    if fixed := [name for name in changed if not name.startswith(_FREE) or name in _FIXED]:
        raise UserError(f"--mode=eval takes the model as it is: {', '.join(fixed)} cannot be set")
    named = [assignment.partition("=")[0].strip() for assignment in assignments]
    data = experiment.data
    tokenizer = tokens.load_tokenizer(folder / TOKENIZER) if isinstance(data, Text) else None
    if isinstance(data, Images):
        split = sources.listings(data, track)[1]
        _check_classes(split.class_names, finished.class_names)
        (examples,) = sources.read([split], data.resize, experiment.model.image_size, track, finished.image_shape)
        name = "held_out"
    else:
        if "data.test" in named:
            path = Path(data.dir if "data.dir" in named else "", data.test).expanduser()
            if not path.is_file():
                raise UserError(f"data.test: there is no file {path}")
            found, name = text.read([path], data, finished.class_names), path.stem
        else:
            splits = sources.listings(data, track)
            found, name = splits[-1], "test" if len(splits) == 3 else "held_out"
            _check_classes(found.class_names, finished.class_names)
        (examples,) = sources.tokenised([found], tokenizer, data.max_length, track)
    _, params = run_params(finished)
    lengths = batch_lengths([examples.inputs.lengths], data) if tokenizer else ()
    this = describe(
        # Nothing is kept: what a cache would take of these examples is no reason to refuse them.
        dataclasses.replace(experiment, plan=config.Plan(cache="off")),
        folder,
        len(finished.class_names),
        len(examples.labels),
        0,
        lengths=lengths,
        tokenizer=tokenizer,
    )
    target = folder / FOLDER
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:  # before the work is done
        raise UserError(f"{target} cannot be made: {error.strerror or error}") from None
    started = time.perf_counter()
    params, frozen = freeze.partition(jax.device_put(params), this.labels)
    found = evaluator(this, preparation(this), None, params, frozen, examples)(params, examples)
    say(f"{name}: {found}")
    figures = {
        "run": remote.url(folder) or str(folder.resolve()),
        "data": dataclasses.asdict(data),
        "examples": len(examples.labels),
        "seconds": time.perf_counter() - started,
        **found.metrics,
        **run.environment(),
    }
    name = _free(target, name, data)
    path = target / f"{name}.json"
    storage.write(path, json.dumps(figures, indent=2) + "\n")
    if found.logits is not None:
        predictions.write_table(target / f"{name}.{predictions.TABLE}", examples, found.logits)
    return found.metrics, name, path


def _free(target: Path, name: str, data: config.Data) -> str:
    """Returns the name, or one with a number behind it where an evaluation of other data has that."""
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(name for name in numbered if _of_same(target / f"{name}.json", data))


def _of_same(path: Path, data: config.Data) -> bool:
    """Whether there is no such evaluation yet, or one of the same files."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [found.get(name) for name in _FILES] == [getattr(data, name, None) for name in _FILES]
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whatever it is, it is nobody's
        return True


def _check_classes(found: Sequence[str], trained: Sequence[str]) -> None:
    if tuple(found) != tuple(trained):
        raise UserError(f"the data have the classes {', '.join(found)}; the run learned {', '.join(trained)}")
