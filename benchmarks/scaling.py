"""What a training step costs on accelerators, on paper: the tables of docs/scaling.md, as Markdown.

    python -m benchmarks.scaling

Nothing is computed on a device but shapes: operations are those that `jaxtl.training.flops` counts in the step as it is
traced; bytes are those that its products read and write, its parameters and its optimiser. What the hardware does in a
second is its makers' figure. docs/scaling.md says what is assumed beyond that.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from jaxtl import experiments
from jaxtl.config import Images, override
from jaxtl.models import kernels
from jaxtl.training import flops, freeze, operations, plan
from jaxtl.training.setup import Setup, count, describe


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices that are connected; figures of one of them.

    Attributes:
        flops: operations a second of products of bfloat16, summed in float32.
        memory: bytes a second between the device and its memory.
        links: bytes a second that it sends to others, over all links that an all-reduce keeps busy, one direction.
    """

    name: str
    devices: int
    flops: float
    memory: float
    links: float


# An ICI link of a v5e carries 50 GB/s each way. Of a 2x4 slice, without wrap-around, a ring uses two links of every
# chip; the 16x16 torus all four.
HARDWARE = (
    Hardware("v5e-8", 8, 197e12, 819e9, 2 * 50e9),
    Hardware("v5e-256", 256, 197e12, 819e9, 4 * 50e9),
    Hardware("8xH100", 8, 989e12, 3.35e12, 450e9),
)


@dataclasses.dataclass(frozen=True)
class Reached:
    """Parts of the makers' figures that are expected of a whole step: assumed, not measured."""

    flops: float = 0.5
    memory: float = 0.8
    links: float = 0.8


@dataclasses.dataclass(frozen=True)
class Work:
    """An experiment, its settings, and the batch of it that each of eight devices has, of the experiment's own."""

    title: str
    experiment: str
    settings: tuple[str, ...]
    batch: int


_AUGMENTED = ("data.augment=flip", "plan.cache=off")  # another image in every epoch: the frozen stages run in each step
WORKS = (
    Work("DeiT-base, block 12 on, cached", "deit_cifar10_lastblock", (), 8),
    Work("DeiT-base, block 12 on, augmented", "deit_cifar10_lastblock", _AUGMENTED, 8),
    Work("DeiT-base, all", "deit_cifar10_lastblock", ("freeze=train_all()",), 8),
    Work("BERT-large (CT-BERT), all", "ctbert_bigru_covid_finetune", ("model.preset=covid_twitter_bert_v2",), 4),
    Work("VGG19, block 5 on, cached", "vgg19_cifar10", (), 8),
    Work("VGG19, block 5 on, augmented", "vgg19_cifar10", _AUGMENTED, 8),
)
LARGE = 64  # the other batch a device that is looked at

# Training and other examples: of CIFAR-10 in the experiments, and of the tweets.
_IMAGES, _TEXTS = (10, 5_000, 1_000), (2, 6_420, 4_280)
_CIFAR10_BYTES = 32 * 32 * 3
# Of a trained parameter with Adam, float32: its gradient is read for the norm and the check that it is finite, and with
# the parameter and two moments for the update, which writes the three back.
_OPTIMIZER_BYTES = 4 + 4 * 4 + 3 * 4
# Of a parameter: read in float32, written as bfloat16, once a step.
_CAST_BYTES = 4 + 2
# Of an entry that a product reads or writes: bfloat16, casts being part of it; of a kernel's gradient: float32.
_ACTIVATION_BYTES, _GRADIENT_BYTES = 2, 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs one device: `fixed` and `each` for every example of its batch.

    Attributes:
        flops: operations, all of them for the examples.
        fixed, each: bytes between the device and its memory.
        parameters: in all.
        used: that the step reads.
        differentiated: used ones of stages that have a backward pass.
        trained: whose gradients are summed over devices.
        host: bytes of an example as it comes from the host.
    """

    flops: float
    fixed: float
    each: float
    parameters: int
    used: int
    differentiated: int
    trained: int
    host: int

    def bytes(self, batch: int) -> float:
        """Returns the bytes between a device and its memory in a step with so many examples for each device."""
        return self.fixed + self.each * batch


def cost(work: Work) -> Cost:
    """Returns what a step of a work costs, from shapes alone."""
    batch = work.batch
    this, operations, values, used = _traced(work, batch)
    _, more_operations, more_values, _ = _traced(work, 2 * batch)
    each, fixed = 0.0, 0
    for (turns, few), (_, many) in zip(values, more_values, strict=True):
        for place, (entries, more_entries) in enumerate(zip(few, many, strict=True)):
            if more_entries > entries:
                each += turns * _ACTIVATION_BYTES * entries / batch
            else:  # a kernel, or the last: its gradient
                fixed += turns * entries * (_GRADIENT_BYTES if place == len(few) - 1 else _ACTIVATION_BYTES)
    params = {path: this.net.params[path] for path in used}
    trained = count(freeze.partition(this.net.params, this.labels)[0])
    stages = this.net.stages
    backward = stages[stages.index(this.plan.boundary) + 1 :] if this.plan.boundary else stages
    differentiated = {path: leaf for path, leaf in params.items() if path.partition("/")[0] in backward}
    return Cost(
        flops=(more_operations - operations) / batch,
        fixed=fixed + _CAST_BYTES * count(params) + _OPTIMIZER_BYTES * trained,
        each=each,
        parameters=count(this.net.params),
        used=count(params),
        differentiated=count(differentiated),
        trained=trained,
        host=_host_bytes(this),
    )


def _host_bytes(this: Setup) -> int:
    data = this.experiment.data
    length = getattr(data, "max_length", 0)
    if this.plan.cached:
        return plan.cache_bytes(this.activations, 1, length, this.experiment.plan.cache_dtype)
    return _CIFAR10_BYTES if isinstance(data, Images) else 4 * length


def _traced(work: Work, batch: int) -> tuple[Setup, int, list[tuple[int, tuple[int, ...]]], list[str]]:
    """Returns the run and, of its step with so many examples: operations, products, and the parameters that it uses."""
    settings = ("train.precision=bfloat16", f"train.batch_size={batch}", *work.settings)
    chosen = override(experiments.load(work.experiment), settings)
    classes, training, others = _IMAGES if isinstance(chosen.data, Images) else _TEXTS
    this = describe(chosen, None, classes, training, others)
    step, arguments = flops.training_step(this, getattr(chosen.data, "max_length", 0))
    with kernels.plain():
        jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    needed, is_used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    state, resting, *_ = arguments
    # As the leaves of the arguments come: all of the state, then the frozen parameters by path.
    before = len(jax.tree.leaves(state))
    frozen = [path for path, used in zip(sorted(resting), is_used[before:], strict=False) if used]
    return this, operations.count(step, *arguments), list(products(needed)), [*state.params, *frozen]


def products(jaxpr: core.Jaxpr, turns: int = 1) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the products and convolutions of a program: how often each runs, entries of its operands and result."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield turns, tuple(math.prod(value.aval.shape) for value in (*equation.invars, *equation.outvars))
        again = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in core.jaxprs_in_params(equation.params):
            yield from products(inner, turns * again)


# --- between devices -------------------------------------------------------------------------------------


def all_reduce_bytes(size: float, devices: int) -> float:
    """Returns what each device sends to sum `size` bytes over a ring: 2 (n - 1) / n of them."""
    return 2 * (devices - 1) / devices * size


def data_parallel_bytes(cost: Cost, devices: int) -> float:
    """Returns what each device sends in a step: gradients of the trained parameters, float32."""
    return all_reduce_bytes(4 * cost.trained, devices)


def fsdp_bytes(cost: Cost, devices: int) -> float:
    """Returns what each device sends in a step with every parameter sharded over all devices.

    Parameters are gathered for the forward pass, and again for the backward pass where their stage has one; gradients
    are summed and scattered. Each moves (n - 1) / n of its bytes, float32.
    """
    return (devices - 1) / devices * 4 * (cost.used + cost.differentiated + cost.trained)


# --- time ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step by the makers' figures; `expected` by what is assumed of them."""

    flops: float
    memory: float
    links: float
    expected: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", self.flops), ("memory", self.memory), ("links", self.links), key=lambda item: item[1])[0]


def times(cost: Cost, hardware: Hardware, batch: int, sent: float, reached: Reached = Reached()) -> Times:
    """Returns how long a step takes with `batch` examples for each device, which sends `sent` bytes.

    Expected: products while memory is read and written, then the collectives, with nothing beside them.
    """
    compute, memory, links = (
        cost.flops * batch / hardware.flops,
        cost.bytes(batch) / hardware.memory,
        sent / hardware.links,
    )
    return Times(compute, memory, links, max(compute / reached.flops, memory / reached.memory) + links / reached.links)


def compute_bound_from(cost: Cost, hardware: Hardware, sent: float) -> tuple[int | None, int]:
    """Returns the smallest batch, of all devices, from which computing takes longest: than memory, and than links.

    None: however large, memory takes longer.
    """
    each = cost.flops / hardware.flops
    spare = each - cost.each / hardware.memory
    memory = math.ceil(cost.fixed / hardware.memory / spare) * hardware.devices if spare > 0 else None
    return memory, math.ceil(sent / hardware.links / each) * hardware.devices


# --- tables ----------------------------------------------------------------------------------------------


def tables(costs: Sequence[tuple[Work, Cost]]) -> str:
    """Returns all tables as Markdown."""
    parts = [
        _table(
            (
                *("", "parameters", "the step uses", "trained", "GFLOP an example", "MB an example"),
                *("MB a step besides", "KB from the host an example"),
            ),
            (
                (
                    work.title,
                    f"{each.parameters:,}",
                    f"{each.used:,}",
                    f"{each.trained:,}",
                    _figure(each.flops / 1e9),
                    _figure(each.each / 1e6),
                    _figure(each.fixed / 1e6),
                    _figure(each.host / 1e3),
                )
                for work, each in costs
            ),
        )
    ]
    heading = ("", "batch", "TFLOP", "GB memory", "MB sent", "MB sent, fsdp", "compute", "memory", "links", "bound by")
    for hardware in HARDWARE:
        rows = (_row(work, each, hardware, batch) for work, each in costs for batch in (work.batch, LARGE))
        parts.append(f"**{hardware.name}**\n\n" + _table((*heading, "expected ms", "examples/s"), rows))
    parts.append(
        _table(
            ("compute-bound from a batch of", *(hardware.name for hardware in HARDWARE)),
            ((work.title, *(_from(each, hardware) for hardware in HARDWARE)) for work, each in costs),
        )
    )
    return "\n\n".join(parts)


def _row(work: Work, cost: Cost, hardware: Hardware, batch: int) -> tuple[str, ...]:
    sent, whole = data_parallel_bytes(cost, hardware.devices), batch * hardware.devices
    found = times(cost, hardware, batch, sent)
    return (
        work.title,
        f"{whole:,}",
        _figure(cost.flops * whole / 1e12),
        _figure(cost.bytes(batch) / 1e9),
        _figure(sent / 1e6),
        _figure(fsdp_bytes(cost, hardware.devices) / 1e6),
        *(_figure(1e3 * seconds) for seconds in (found.flops, found.memory, found.links)),
        found.bound,
        _figure(1e3 * found.expected),
        f"{float(f'{whole / found.expected:.2g}'):,.0f}",
    )


def _from(cost: Cost, hardware: Hardware) -> str:
    memory, links = compute_bound_from(cost, hardware, data_parallel_bytes(cost, hardware.devices))
    if memory is None:
        return f"never (memory); links: {links:,}"
    return f"{max(memory, links):,} (memory {memory:,}, links {links:,})"


def _figure(value: float) -> str:
    """Returns three significant digits."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def _table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(tables([(work, cost(work)) for work in WORKS]))
