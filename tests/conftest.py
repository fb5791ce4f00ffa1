"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder of real checkpoints: `dinov2-small` and `minilm-l6` in Hugging Face's layout."""
    folder = os.environ.get("JAXTL_TEST_WEIGHTS")
    if not folder:
        pytest.skip("JAXTL_TEST_WEIGHTS names no folder of real checkpoints")
    return Path(folder)


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """A tensorflow-datasets folder with CIFAR-10 prepared in it."""
    folder = os.environ.get("JAXTL_TEST_TFDS")
    if not folder:
        pytest.skip("JAXTL_TEST_TFDS names no tfds data dir with cifar10")
    return Path(folder)
