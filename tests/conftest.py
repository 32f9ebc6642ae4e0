"""What holds for all tests: quiet TensorFlow, no GPUs, a folder for each test."""

import os
import tempfile
from pathlib import Path

import pytest

from tests import patience

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def pytest_configure(config):
    patience.factor()  # an error at once where it is no number


@pytest.fixture
def tmp_path():
    """A folder of this test and process."""
    # pytest's keeps the last ones of all processes in one place, and tidies up there: ranks of one
    # job that do so at the same time take folders away from under each other.
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
