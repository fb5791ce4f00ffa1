"""What a step is said to keep on a device, against what XLA allots for the compiled one."""

import jax
import pytest

from jaxtl import config
from jaxtl.errors import UserError
from jaxtl.training import flops, memory
from jaxtl.training.setup import describe

IMAGES = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("mlp", "cls", hidden=256)),
    data=config.Images(source="digits"),
    optim=config.Optim("adamw"),
    train=config.Train(epochs=4, batch_size=256),
)


def described(*changes):
    return describe(config.override(IMAGES, changes), None, 10, 1_000, 500)


def test_parameters_and_optimiser_state_are_what_a_step_is_given():
    """All that enters a step is either theirs or the batch; activations are the larger part of its own memory."""
    this = described("freeze=train_all()")
    found = memory.of(this, 1)
    train_step, arguments = flops.training_step(this, 0)
    measured = train_step.lower(*arguments).compile().memory_analysis()
    batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[2]))
    assert 0 <= measured.argument_size_in_bytes - found.parameters - found.optimizer - batch < 4096  # counters, a key
    assert found.gradients == found.parameters
    # XLA makes some of it again rather than keep it, and needs room for the largest products beside it.
    assert 0.5 * found.activations < measured.temp_size_in_bytes < 2 * (found.activations + found.gradients)


def test_what_is_frozen_has_no_gradient_no_optimiser_state_and_no_activations():
    everything, last = (
        memory.of(described(f"freeze={rule}", "plan.cache=off"), 1) for rule in ("train_all()", 'train_from("block_4")')
    )
    assert last.parameters == everything.parameters
    assert last.gradients < everything.gradients / 2
    assert last.optimizer < everything.optimizer / 2
    assert last.activations < everything.activations / 3


def test_more_devices_hold_less():
    one, eight = (memory.of(described("freeze=train_all()"), devices) for devices in (1, 8))
    assert eight.activations == pytest.approx(one.activations / 8, rel=0.05)
    assert (eight.parameters, eight.gathered) == (one.parameters, 0)
    divided = memory.of(described("freeze=train_all()", "parallel.fsdp=8"), 8)
    assert divided.parameters + divided.gathered == one.parameters
    assert one.parameters / 8 < divided.parameters < one.parameters / 2  # small ones are whole on every device
    assert divided.optimizer == pytest.approx(2 * divided.parameters, rel=0.01)
    with pytest.raises(UserError, match="cannot be divided among 7 devices"):
        memory.of(described("freeze=train_all()"), 7)
