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
