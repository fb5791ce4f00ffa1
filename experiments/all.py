"""The whole study: its six models of COVID-19 tweets and its models of CIFAR-10, compared with what it reports.

Settings of one part alone are given by member, as in `--set deit_cifar10.data.dir=DIR`.

Command: python -m jaxtl.main --suite=all

Expected: see covid and cifar10.
"""

from jaxtl.config import Suite
from jaxtl.experiments import load


def experiment() -> Suite:
    """Returns the suite."""
    return Suite(members=(*load("covid").members, *load("cifar10").members))
