"""What would be trained, on what, and how: printed before anything is."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxtl.config import Data, Experiment, Images, Suite
from jaxtl.evaluation import compare
from jaxtl.training import freeze, optim, suite
from jaxtl.training.setup import Setup, count, preview

SPLITS = ("training", "held-out", "test")


def explain(chosen: Experiment | Suite, workdir: Path) -> None:
    """Prints model, stages with parameters trained and frozen, data, and what will happen.

    Lists images without decoding them, reads and tokenises texts. From the Hub no weights are fetched, and config and
    tokenizer only where the size is asked for by `from_weights`.

    Raises:
        UserError: what would stop the run.
    """
    if isinstance(chosen, Experiment):
        _show("", *preview(chosen, download=False), workdir)
        return
    members = suite.resolve(chosen, workdir)
    described = suite.as_describable(members)
    for name, member, _ in members:
        this, splits = preview(described[name], download=False)
        _show(name, dataclasses.replace(this, experiment=member), splits, workdir / name)


def _show(name: str, this: Setup, splits: list[Any], workdir: Path) -> None:
    experiment = this.experiment
    model, head, data, settings = experiment.model, experiment.model.head, experiment.data, experiment.train
    learning, resting = freeze.partition(this.net.params, this.labels)
    console = Console(highlight=False, markup=False, soft_wrap=True)  # a class may be called [/b]
    if name:
        console.print(f"\n{name}", style="bold")
    size = f"{model.image_size} pixels" if isinstance(data, Images) else f"up to {data.max_length} word pieces"
    console.print(
        f"model   {model.preset}, weights {model.weights}, {size}, {settings.precision}; "
        f"head {head.kind} on {head.reads}"
    )
    rows = []
    by_stage = collections.defaultdict(list)
    for path in this.net.params:
        by_stage[path.partition("/")[0]].append(path)
    for stage in this.net.stages:
        trained = sum(count({path: learning[path]}) for path in by_stage[stage] if path in learning)
        frozen = sum(count({path: resting[path]}) for path in by_stage[stage] if path in resting)
        rows.append((stage, f"{trained:,}" if trained else "", f"{frozen:,}" if frozen else ""))
    rows.append(("all", f"{count(learning):,}", f"{count(resting):,}"))
    compare.show(("stage", "trained parameters", "frozen parameters"), rows, numbers=True)
    rate = optim.peak_rate(experiment.optim, getattr(this.net.config, "width", None))
    factors = "".join(f", {group} {factor:g} times that" for group, factor in experiment.optim.multipliers)
    sizes = ", ".join(f"{len(split.labels):,} {name}" for split, name in zip(splits, SPLITS, strict=False))
    console.print(f"data    {_source(data)}: {sizes} examples; {_classes(splits[0])}; {_prepared(this)}")
    console.print(
        f"train   {this.steps:,} steps of {settings.batch_size} examples ({settings.epochs} epochs of "
        f"{this.steps_per_epoch}), {experiment.optim.name}, learning rate {rate:g} {experiment.optim.schedule}"
        f"{factors}, seed {settings.seed}"
    )
    if this.plan.boundary:
        what = "run once, cached" if this.plan.cached else "run every step, forwards only, not cached"
        console.print(f"plan    stages up to {this.plan.boundary} {what}: {this.plan.reason}")
    else:
        console.print(f"plan    every stage runs forwards and backwards in every step: {this.plan.reason}")
    console.print(f"writes  {workdir}")


def _source(data: Data) -> str:
    if isinstance(data, Images):
        return " ".join(part for part in (data.source, data.name, data.dir) if part)
    return " ".join(part for part in (data.name, data.dir, *data.train, data.validation, data.test) if part)


def _prepared(this: Setup) -> str:
    data = this.experiment.data
    if isinstance(data, Images):
        return f"scaled {data.scale}, augmentation {data.augment}"
    hidden = f", {data.mask_rate:.0%} hidden" if this.experiment.model.head.kind == "mlm" else ""
    if not this.lengths:
        return f"at most {data.buckets} lengths of batches, chosen when the tokenizer is at hand{hidden}"
    return f"batches {', '.join(map(str, this.lengths))} word pieces long{hidden}"


def _classes(split: Any) -> str:
    if not split.class_names:
        return "no labels"
    numbers = np.bincount(split.labels, minlength=len(split.class_names))
    shown = [f"{name} {number}" for name, number in zip(split.class_names, numbers, strict=True)][:12]
    return f"{len(split.class_names)} classes: {', '.join(shown)}" + (", .." if len(split.class_names) > 12 else "")
