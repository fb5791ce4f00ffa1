"""Finished runs side by side: what is the same about them, what differs, and how much of that may be chance.

Runs that differ by their seed alone are one row; runs that were judged on the same examples are tested against each
other.
"""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtl import config
from jaxtl.errors import UserError
from jaxtl.evaluation import ensemble, metrics, predictions, statistics, terminal
from jaxtl.evaluation.runs import Run, pictures
from jaxtl.evaluation.statistics import Answers, Interval, McNemar
from jaxtl.training import run as run_folder

_HARDEST = 200  # examples that are kept of those that not all models get right
_SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a row.

    Attributes:
        value: of several seeds, the mean.
        interval: 95 %: of one run over the examples that it is judged by (bootstrap), of several over their seeds
            (Student); None where there is none.
        spread: lowest and highest of several seeds.
    """

    value: float
    interval: Interval | None = None
    spread: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A run; several that differ by their seed alone; or an ensemble.

    Attributes:
        runs: the one, those in the order of their seeds, or the members of the ensemble.
        figures: by their path in result.json, those of the judged split without its name: `accuracy`, `f1/real`.
        rule: of an ensemble.
    """

    name: str
    runs: tuple[Run, ...]
    figures: Mapping[str, Figure]
    rule: ensemble.Rule | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rows on the same examples.

    Attributes:
        first, second: their names, the more accurate one first. Of several seeds, the lowest is tested.
        difference: accuracy of the first less that of the second, of the runs that are tested.
        adjusted: p-value of the test, as Holm adjusts it for the number of pairs.
    """

    first: str
    second: str
    difference: Figure
    test: McNemar
    adjusted: float


@dataclasses.dataclass(frozen=True)
class Hard:
    """An example that not all runs get right.

    Attributes:
        text: empty for images.
        image: as a `data:` address, where it is at hand, see `illustrated`.
        answers: class and its probability, of each row (of several seeds, the lowest).
        wrong: the runs that get it wrong, of all.
    """

    id: str
    text: str
    label: str
    answers: tuple[tuple[str, float], ...]
    wrong: int
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Pool:
    """Rows that were judged on the same examples.

    Attributes:
        heading: what examples these are, in words; of two pools they differ.
        class_names: of the models.
        examples: their number.
        rows: names of the rows.
        runs: their number, without the ensemble.
        pairs: every two of them, tested.
        hard: examples that not all runs get right, those that most get wrong first; at most 200.
        wrong: number of examples by the number of runs that get them wrong.
    """

    heading: str
    class_names: tuple[str, ...]
    examples: int
    rows: tuple[str, ...]
    runs: int
    pairs: tuple[Pair, ...]
    hard: tuple[Hard, ...]
    wrong: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is shown.

    Attributes:
        notes: what to know to read it: what could not be compared, and why.
    """

    rows: tuple[Row, ...]
    pools: tuple[Pool, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[Run], rule: ensemble.Rule | None = None) -> Comparison:
    """Compares runs.

    Args:
        runs: one or more.
        rule: makes an ensemble of all runs that were judged on the same examples, where there are two or more.
    """
    groups = _by_recipe(runs)
    rows = [Row(group[0].name, group, _figures(group)) for group in groups]
    by_examples: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group[0].predictions is not None:
            by_examples.setdefault(_examples(group[0]), []).append(index)
    pools, ensembles = [], []
    for members in by_examples.values():
        name = f"ensemble: {rule} of {sum(len(rows[index].runs) for index in members)}"
        while name in {row.name for row in (*rows, *ensembles)}:
            name += "'"
        pool, with_intervals, combined = _pool([rows[index] for index in members], rule, name)
        for index, row in zip(members, with_intervals, strict=True):
            rows[index] = row
        alike = sum(other.heading.startswith(pool.heading) for other in pools)
        pools.append(dataclasses.replace(pool, heading=pool.heading + f", set {alike + 1}" * bool(alike)))
        ensembles += combined
    notes = _notes(rows, pools)
    if rule and (alone := [pool.rows[0] for pool in pools if pool.runs < 2]):
        notes.append(f"No ensemble of {', '.join(alone)}: it takes two runs that were judged on the same examples.")
    return Comparison((*rows, *ensembles), tuple(pools), tuple(notes))


def illustrated(found: Comparison) -> Comparison:
    """Returns the comparison with the images of the hardest examples, as far as the data sets are at hand."""
    runs_by_row = {row.name: row.runs for row in found.rows}
    pools, notes = [], list(found.notes)
    for pool in found.pools:
        run, hard = runs_by_row[pool.rows[0]][0], pool.hard
        if isinstance(run.experiment.data, config.Images) and hard:
            try:
                images = pictures(run, [example.id for example in hard])
                hard = tuple(dataclasses.replace(example, image=images[example.id]) for example in hard)
            except UserError as error:
                notes.append(f"Examples are shown without their images: {error}.")
        pools.append(dataclasses.replace(pool, hard=hard))
    return dataclasses.replace(found, pools=tuple(pools), notes=tuple(notes))


def _by_recipe(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """Returns the runs, those together that differ by their seed alone; the same seed again is a row of its own."""
    groups: dict[tuple[str, int], list[Run]] = {}
    repeated: collections.Counter = collections.Counter()
    for run in runs:
        recipe = _recipe(run.experiment, 0) + (_examples(run) if run.predictions else "")
        repeated[recipe, run.seed] += 1
        groups.setdefault((recipe, repeated[recipe, run.seed]), []).append(run)
    return [tuple(sorted(group, key=lambda run: run.seed)) for group in groups.values()]


def _recipe(experiment: config.Experiment, depth: int) -> str:
    """Returns all that decides about a run but its seed; of a run that it starts from, all but the seed too."""
    fields = metrics.flat(dataclasses.asdict(experiment))
    decides = {path.replace("/", "."): value for path, value in fields.items()}
    weights = Path(experiment.model.weights)
    if depth < 8 and (weights / run_folder.EXPERIMENT).is_file():  # a folder could name itself
        decides["model.weights"] = _recipe(run_folder.read_experiment(weights), depth + 1)
    decides = {
        path: value
        for path, value in decides.items()
        if path != _SEED and not path.startswith(run_folder.WITHOUT_EFFECT)
    }
    return json.dumps(decides, sort_keys=True)


def _examples(run: Run) -> str:
    """Returns a digest of which examples a run was judged on, and the class of each; their order does not matter."""
    order, names = _order(run), np.array(run.class_names)
    told = [sorted(run.class_names), [run.predictions.ids[row] for row in order]]
    return hashlib.sha256(
        json.dumps([*told, names[run.predictions.labels[order]].tolist(), run.split]).encode()
    ).hexdigest()


def _order(run: Run) -> np.ndarray:
    return np.argsort(np.array(run.predictions.ids), kind="stable")


def _figures(runs: tuple[Run, ...]) -> dict[str, Figure]:
    found = [_numbers(run.result) for run in runs]
    figures = {}
    for name in found[0]:
        values = [numbers[name] for numbers in found if name in numbers]
        if len(values) < 2:
            figures[name] = Figure(values[0])
        else:
            interval = _possible(name, statistics.over_seeds(values))
            figures[name] = Figure(float(np.mean(values)), interval, (min(values), max(values)))
    return figures


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a result by path, those of the judged split without its name."""
    split, found = terminal.judged_split(result)
    more: dict[str, Any] = {"held_out_accuracy": result["accuracy"]} if split == "test" else {}
    numbers = {
        name: value
        for name, value in metrics.flat({**result, **more, **found}).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    if numbers.get("seconds_per_epoch") and "train_examples" in numbers:
        numbers["examples_per_second"] = numbers["train_examples"] / numbers["seconds_per_epoch"]
    return numbers


def _possible(name: str, interval: Interval) -> Interval:
    """Returns the part of an interval that the figure can lie in."""
    share = name.partition("/")[0].removesuffix("_macro").removesuffix("_weighted").split("_")[-1]
    high = 1.0 if share in ("accuracy", "precision", "recall", "f1", "auc") else np.inf
    return Interval(max(interval.low, 0.0), min(interval.high, high))


def _heading(run: Run) -> str:
    count, names = len(run.predictions.ids), run.class_names
    shown = ", ".join(names[:5]) + (", .." if len(names) > 5 else "")
    return f"{count:,} {run.split.replace(' ', '-')} examples of {len(names)} classes ({shown})"


@dataclasses.dataclass(frozen=True)
class _Aligned:
    """Answers to the examples of a pool in their one order, classes numbered as the pool numbers them."""

    answers: Answers
    likely: np.ndarray


def _pool(rows: Sequence[Row], rule: ensemble.Rule | None, name: str) -> tuple[Pool, list[Row], list[Row]]:
    """Returns the pool of these rows; the rows, with intervals; and their ensemble of this name, if there is one."""
    first, runs = rows[0].runs[0], [run for row in rows for run in row.runs]
    aligned = {run.name: _align(run, first) for run in runs}
    tested = {row.name: aligned[row.runs[0].name] for row in rows}
    combined = []
    if rule and len(runs) > 1:
        tested[name] = _combine([aligned[run.name].likely for run in runs], aligned[first.name].answers, rule)
        scores = statistics.scores(tested[name].answers)
        figures = {figure: Figure(float(values[0])) for figure, values in scores.items()}
        combined = [Row(name, tuple(runs), figures | _confusion(tested[name].answers), rule)]
    draws = statistics.bootstrap({name: found.answers for name, found in tested.items()})
    single = [row for row in (*rows, *combined) if len(row.runs) == 1 or row.rule]
    with_intervals = {row.name: _with_intervals(row, draws[row.name]) for row in single}
    wrong = np.sum([~found.answers.right for found in aligned.values()], axis=0)
    numbers, counts = np.unique(wrong, return_counts=True)
    return (
        Pool(
            _heading(first),
            first.class_names,
            len(wrong),
            tuple(tested),
            len(runs),
            tuple(_pairs(tested, draws)),
            tuple(_hard(first, runs, tested, wrong)),
            dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        ),
        [with_intervals.get(row.name, row) for row in rows],
        [with_intervals[row.name] for row in combined],
    )


def _align(run: Run, like: Run) -> _Aligned:
    found, rows = run.predictions, np.empty(len(run.predictions.ids), int)
    rows[_order(like)] = _order(run)
    _, columns = ensemble.columns([(like.name, like.class_names), (run.name, run.class_names)])
    likely = found.probabilities[:, columns][rows]
    losses = metrics.losses(found.logits, found.labels)[rows]
    return _Aligned(Answers(like.predictions.labels, likely.argmax(axis=-1), like.class_names, losses), likely)


def _combine(members: Sequence[np.ndarray], like: Answers, rule: ensemble.Rule) -> _Aligned:
    combined = ensemble.combine(members, rule)
    losses = None
    if rule == "mean":  # shares of votes are no probabilities
        of_label = combined.probabilities[np.arange(len(like.labels)), like.labels]
        losses = -np.log(np.maximum(of_label, np.finfo(np.float64).tiny))
    return _Aligned(Answers(like.labels, combined.predicted, like.class_names, losses), combined.probabilities)


def _confusion(answers: Answers) -> dict[str, Figure]:
    names = answers.class_names
    counts = collections.Counter(zip(answers.labels.tolist(), answers.predicted.tolist(), strict=True))
    return {
        f"confusion/{true}/{name}": Figure(float(counts[row, column]))
        for row, true in enumerate(names)
        for column, name in enumerate(names)
    }


def _with_intervals(row: Row, draws: Mapping[str, np.ndarray]) -> Row:
    found = {name: statistics.percentile(values) for name, values in draws.items() if name in row.figures}
    return dataclasses.replace(
        row,
        figures={
            name: dataclasses.replace(figure, interval=found.get(name, figure.interval))
            for name, figure in row.figures.items()
        },
    )


def _pairs(tested: Mapping[str, _Aligned], draws: Mapping[str, Mapping[str, np.ndarray]]) -> list[Pair]:
    right = {name: found.answers.right for name, found in tested.items()}
    ranked = sorted(tested, key=lambda name: -right[name].mean())  # stable
    names = [(first, second) for index, first in enumerate(ranked) for second in ranked[index + 1 :]]
    tests = [statistics.mcnemar(right[first], right[second]) for first, second in names]
    pairs = []
    for (first, second), test, adjusted in zip(names, tests, statistics.holm([test.p for test in tests]), strict=True):
        interval = statistics.percentile(draws[first]["accuracy"] - draws[second]["accuracy"])
        difference = Figure((test.first - test.second) / len(right[first]), interval)
        pairs.append(Pair(first, second, difference, test, adjusted))
    return pairs


def _hard(first: Run, runs: Sequence[Run], tested: Mapping[str, _Aligned], wrong: np.ndarray) -> list[Hard]:
    """Returns the examples that most runs get wrong; among equals, those whose class is held least likely."""
    labels, names = first.predictions.labels, first.class_names
    texts = next((run.texts for run in runs if run.texts), {})
    models = list(tested.values())
    of_label = np.mean([model.likely[np.arange(len(labels)), labels] for model in models], axis=0)
    order = np.lexsort((of_label, -wrong))
    return [
        Hard(
            first.predictions.ids[row],
            texts.get(first.predictions.ids[row], ""),
            names[labels[row]],
            tuple(
                (names[number], float(model.likely[row, number]))
                for model in models
                for number in [model.answers.predicted[row]]
            ),
            int(wrong[row]),
        )
        for row in order[:_HARDEST]
        if wrong[row]
    ]


def _notes(rows: Sequence[Row], pools: Sequence[Pool]) -> list[str]:
    notes = []
    if len(pools) > 1:
        notes.append(
            "Runs that were judged on other examples than each other have tables of their own, and are not tested "
            "against each other: what differs between them may be the examples."
        )
    if without := [row.name for row in rows if row.runs[0].predictions is None]:
        notes.append(
            f"No intervals over examples and no tests of {', '.join(without)}: {predictions.ARRAYS}, with the answers "
            "to single examples, is not there; masked language modelling has none."
        )
    if repeated := [row for row in rows if len(row.runs) > 1]:
        by_seeds: dict[str, list[str]] = {}
        for row in repeated:
            by_seeds.setdefault(", ".join(str(run.seed) for run in row.runs), []).append(row.name)
        listed = "; ".join(f"seeds {seeds} of {', '.join(names)}" for seeds, names in by_seeds.items())
        notes.append(
            f"Runs that differ by their seed alone are one row, and that of the lowest seed is tested: {listed}."
        )
    machines = {str(run.result.get("device")) for row in rows for run in row.runs}
    if len(machines) > 1:
        notes.append(f"Times and memory are those of different machines: {', '.join(sorted(machines))}.")
    return notes
