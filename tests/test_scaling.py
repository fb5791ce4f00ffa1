"""The arithmetic of docs/scaling.md: counts against figures worked out by hand, and the document against the script."""

from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import Cost, Hardware, Reached

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
WORKS = {work.title: work for work in scaling.WORKS}
MADE_UP = Hardware("made up", devices=4, flops=1e12, memory=1e9, links=1e8)
COST = Cost(flops=1e9, fixed=5e6, each=5e5, parameters=300, used=200, differentiated=100, trained=50, host=0)


def test_vgg19_from_block_5_costs_what_its_layers_do():
    """Four convolutions, 512 to 512 channels on 14 x 14, and two dense layers, 25,088 to 256 to 10.

    Of a dimension of 14, a kernel of 3 meets 3 * 14 - 2 = 40 pixels, not counting the padding. Forwards 4, kernels'
    gradients 4, inputs' gradients 3: nothing learns below the first.
    """
    found = scaling.cost(WORKS["VGG19, block 5 on, cached"])
    convolution, dense = 512 * 512, 25_088 * 256 + 256 * 10
    assert found.flops == 2 * 11 * convolution * 40**2 + 2 * 3 * dense
    pixels = 14 * 14 * 512  # of what enters, of what leaves: 11 convolutions read or write two of these each
    assert found.each == 2 * (11 * 2 * pixels + 3 * (25_088 + 256) + 3 * (256 + 10))
    assert found.trained == found.used == found.differentiated == 15_864_586  # the study's own count
    # Kernels: read forwards and for the inputs' gradients in bfloat16, their gradients written in float32.
    kernels = 9 * convolution * (4 * 2 + 3 * 2 + 4 * 4) + dense * (2 + 2 + 4)
    assert found.fixed == kernels + (6 + 32) * 15_864_586
    assert found.host == 2 * pixels  # bfloat16, cached


def test_deit_trains_and_sends_its_last_block_only():
    found = scaling.cost(WORKS["DeiT-base, block 12 on, cached"])
    assert (found.used, found.trained, found.parameters) == (8_886_234, 8_886_234, 87_597_018)
    # Eight devices: 2 * 7 / 8 of four bytes each.
    assert scaling.data_parallel_bytes(found, 8) == 7 * 8_886_234
    assert found.host == 198 * 768 * 2


def test_what_devices_send():
    assert scaling.all_reduce_bytes(100, 1) == 0
    assert scaling.all_reduce_bytes(100, 2) == 100  # half of it each way
    # Gathered: 200 parameters forwards, 100 backwards; scattered: 50 gradients; three quarters of 4 bytes each.
    assert scaling.fsdp_bytes(COST, 4) == 3 * (200 + 100 + 50)


def test_step_takes_as_long_as_what_takes_longest():
    # 10 examples: 10 ms of computing, 10 ms of memory; 1 MB sent: 10 ms.
    found = scaling.times(COST, MADE_UP, 10, 1e6, Reached(flops=0.5, memory=0.8, links=0.5))
    assert (found.flops, found.memory, found.links) == pytest.approx((0.01, 0.01, 0.01))
    assert found.expected == pytest.approx(0.02 + 0.02)
    assert scaling.times(COST, MADE_UP, 20, 1e6).bound == "compute"
    assert scaling.times(COST, MADE_UP, 5, 0).bound == "memory"
    # An example: 1 ms of computing, half a millisecond of memory beside 5 ms for each step; 30 ms of links.
    assert scaling.compute_bound_from(COST, MADE_UP, 3e6) == (10 * 4, 30 * 4)
    slow = Hardware("slow memory", devices=4, flops=1e12, memory=1e8, links=1e8)
    assert scaling.compute_bound_from(COST, slow, 3e6)[0] is None


@pytest.mark.slow
def test_document_holds_what_the_script_prints():
    printed = scaling.tables([(work, scaling.cost(work)) for work in scaling.WORKS])
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document.split("<!-- python -m benchmarks.scaling -->\n")[1].split("\n<!-- end -->")[0].strip() == printed
