"""The study's models of CIFAR-10, VGG19 and DeiT-base, and DeiT by its paper's rule, compared with what is reported.

All are judged on the same 1,000 held-out images. With weights or a data dir of your own: `--set model.weights=DIR` is
for all, `--set vgg19_cifar10.model.weights=FILE` for one.

Command: python -m jaxtl.main --suite=cifar10

Expected: accuracy 0.852 (VGG19) and 0.967 (DeiT), loss 0.62 and 0.118 (reported by the study); 0.9645 by the paper's
rule (reported by the paper, on all 50,000 images).
"""

from jaxtl.config import Suite
from jaxtl.experiments import load

MEMBERS = ("vgg19_cifar10", "deit_cifar10", "deit_cifar10_lastblock")


def experiment() -> Suite:
    """Returns the suite."""
    return Suite(members=tuple((name, load(name)) for name in MEMBERS))
