"""What would be trained, on what, and how: printed before anything is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxtl import config, remote
from jaxtl.config import Data, Experiment, Images, Plan, Suite
from jaxtl.evaluation import terminal
from jaxtl.models import presets
from jaxtl.training import flops, freeze, memory, optim, suite
from jaxtl.training.network import network
from jaxtl.training.setup import Setup, count, preview

SPLITS = ("training", "held-out", "test")


def explain(chosen: Experiment | Suite, workdir: Path, as_json: bool = False) -> None:
    """Prints model, stages with parameters trained and frozen, data, what will happen, and what it costs.

    Lists images without decoding them, reads and tokenises texts. From the Hub no weights are fetched, and config and
    tokenizer only where the size is asked for by `from_weights`.

    Args:
        chosen: an experiment, or a suite of them.
        workdir: where it would write.
        as_json: print what `describe` returns, of a suite by member, for programs to read.

    Raises:
        UserError: what would stop the run.
    """
    if isinstance(chosen, Experiment):
        members = {"": describe(*preview(chosen, download=False), workdir)}
    else:
        resolved = suite.resolve(chosen, workdir)
        described = suite.as_describable(resolved)
        members = {}
        for name, member, _ in resolved:
            this, splits = preview(described[name], download=False)
            members[name] = describe(this, splits, workdir / name, member)
    if as_json:
        print(json.dumps(members.get("", members), indent=2))
        return
    for name, found in members.items():
        _show(name, found)


def describe(this: Setup, splits: list[Any], workdir: Path, shown: Experiment | None = None) -> dict[str, Any]:
    """Returns all that is shown of a run, as plain data.

    Of the costs, `flops_without` are those of a trainer that differentiates the same parameters, and else runs the
    whole model in every step.

    Args:
        this: the run.
        splits: its examples.
        workdir: where it would write.
        shown: the experiment as it was asked for, where it can only be described as another one.
    """
    experiment = this.experiment
    learning, resting = freeze.partition(this.net.params, this.labels)
    by_stage = {stage: {"trained": 0, "frozen": 0} for stage in this.net.stages}
    for kind, params in (("trained", learning), ("frozen", resting)):
        for path, leaf in params.items():
            by_stage[path.partition("/")[0]][kind] += count({path: leaf})
    plain = dataclasses.replace(experiment, plan=Plan(cache="off", prune=False))
    without = dataclasses.replace(
        this,
        experiment=plain,
        net=network(plain, len(splits[0].class_names), this.weights),
        plan=dataclasses.replace(this.plan, cached=False),
    )
    return {
        "experiment": dataclasses.asdict(shown or experiment),
        "stages": by_stage,
        "trained": count(learning),
        "frozen": count(resting),
        "examples": {name: len(split.labels) for split, name in zip(splits, SPLITS, strict=False)},
        "classes": _classes(splits[0]),
        "lengths": list(this.lengths),
        "steps": this.steps,
        "steps_per_epoch": this.steps_per_epoch,
        "learning_rate": optim.peak_rate(experiment.optim, getattr(this.net.config, "width", None)),
        "plan": dataclasses.asdict(this.plan),
        "leading_tokens": presets.leading(this.net.config, experiment.model.head.reads)
        if experiment.plan.prune
        else None,
        "memory": dataclasses.asdict(memory.of(this, experiment.parallel.devices or jax.device_count())),
        "flops": dataclasses.asdict(flops.of(this, splits)),
        "flops_without": dataclasses.asdict(flops.of(without, splits)),
        "workdir": remote.shown(workdir),
    }


def _show(name: str, found: dict[str, Any]) -> None:
    experiment = config.decode(found["experiment"], Experiment)
    model, head, data, settings = experiment.model, experiment.model.head, experiment.data, experiment.train
    console = Console(highlight=False, markup=False, soft_wrap=True)  # a class may be called [/b]
    if name:
        console.print(f"\n{name}", style="bold")
    size = f"{model.image_size} pixels" if isinstance(data, Images) else f"up to {data.max_length} word pieces"
    console.print(
        f"model   {model.preset}, weights {model.weights}, {size}, {settings.precision}; "
        f"head {head.kind} on {head.reads}"
    )
    rows = [
        (stage, *(f"{numbers[kind]:,}" if numbers[kind] else "" for kind in ("trained", "frozen")))
        for stage, numbers in found["stages"].items()
    ]
    rows.append(("all", f"{found['trained']:,}", f"{found['frozen']:,}"))
    terminal.show(("stage", "trained parameters", "frozen parameters"), rows, numbers=True)
    factors = "".join(f", {group} {factor:g} times that" for group, factor in experiment.optim.multipliers)
    sizes = ", ".join(f"{number:,} {split}" for split, number in found["examples"].items())
    classes, prepared = _named(found["classes"]), _prepared(experiment, found["lengths"])
    console.print(f"data    {_source(data)}: {sizes} examples; {classes}; {prepared}")
    console.print(
        f"train   {found['steps']:,} steps of {settings.batch_size} examples ({settings.epochs} epochs of "
        f"{found['steps_per_epoch']}), {experiment.optim.name}, learning rate {found['learning_rate']:g} "
        f"{experiment.optim.schedule}{factors}, seed {settings.seed}"
    )
    plan, leading = found["plan"], found["leading_tokens"]
    if plan["boundary"]:
        what = "run once, cached" if plan["cached"] else "run every step, forwards only, not cached"
        console.print(f"plan    stages up to {plan['boundary']} {what}: {plan['reason']}")
    else:
        console.print(f"plan    every stage runs forwards and backwards in every step: {plan['reason']}")
    if leading:
        tokens = "the first token" if leading == 1 else f"the first {leading} tokens"
        console.print(f"        the head reads {tokens}: the last block computes no others")
    _show_flops(found["flops"], found["flops_without"])
    _show_memory(memory.Memory(**found["memory"]), experiment.parallel.fsdp)
    console.print(f"writes  {found['workdir']}")


def _show_flops(planned: dict[str, int], without: dict[str, int]) -> None:
    """Prints what the run costs, beside a trainer that runs the whole model in every step."""
    headings = {
        "once": "frozen stages, once",
        "step": "a training step",
        "epoch": "an epoch of training",
        "evaluation": "an evaluation",
        "run": "all of the run",
    }
    rows = [
        (heading, _number(planned[field]), _number(without[field]), _ratio(planned[field], without[field]))
        for field, heading in headings.items()
        if planned[field] or without[field]
    ]
    terminal.show(("GFLOP", "with this plan", "without", "times less"), rows, numbers=True)


def _show_memory(found: memory.Memory, fsdp: int) -> None:
    """Prints what a training step keeps in memory."""
    rows = [
        ("parameters", found.parameters),
        ("optimiser", found.optimizer),
        ("gradients", found.gradients),
        ("gathered parameters", found.gathered),
        ("activations for the backward pass", found.activations),
        ("all of these", found.device),
        ("in the host's memory: kept activations", found.cache),
    ]
    devices = "one device" if found.devices == 1 else f"each of {found.devices} devices"
    devices += f", parameters divided among {fsdp}" if fsdp > 1 else ""
    terminal.show((f"GB on {devices}", ""), [(name, f"{size / 1e9:.3g}") for name, size in rows if size], numbers=True)


def _number(flops: int) -> str:
    billions = flops / 1e9
    return f"{billions:,.0f}" if billions >= 100 else f"{billions:.3g}"


def _ratio(planned: int, without: int) -> str:
    return f"{without / planned:,.1f}" if planned and without else ""


def _source(data: Data) -> str:
    if isinstance(data, Images):
        return " ".join(part for part in (data.source, data.name, data.dir) if part)
    return " ".join(part for part in (data.name, data.dir, *data.train, data.validation, data.test) if part)


def _prepared(experiment: Experiment, lengths: list[int]) -> str:
    data = experiment.data
    if isinstance(data, Images):
        return f"scaled {data.scale}, augmentation {data.augment}"
    hidden = f", {data.mask_rate:.0%} hidden" if experiment.model.head.kind == "mlm" else ""
    if not lengths:
        most = "" if data.buckets is None else f"at most {data.buckets} "
        return f"{most}lengths of batches chosen when the tokenizer is at hand{hidden}"
    return f"batches {', '.join(map(str, lengths))} word pieces long{hidden}"


def _classes(split: Any) -> dict[str, int]:
    numbers = np.bincount(split.labels, minlength=len(split.class_names))
    return {name: int(number) for name, number in zip(split.class_names, numbers, strict=False)}


def _named(classes: dict[str, int]) -> str:
    if not classes:
        return "no labels"
    shown = [f"{name} {number}" for name, number in classes.items()][:12]
    return f"{len(classes)} classes: {', '.join(shown)}" + (", .." if len(classes) > 12 else "")
