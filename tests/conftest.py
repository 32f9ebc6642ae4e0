"""What holds for all tests: quiet TensorFlow, no GPUs, a folder for each test."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

from tests import patience

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# What TensorFlow and the tests' modules bring with them stays for as long as the process: to look
# through it for garbage again and again would take a tenth of all the time.
gc.disable()


def pytest_configure(config):
    patience.factor()  # an error at once where it is no number


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture
def tmp_path():
    """A folder of this test and process."""
    # pytest's keeps the last ones of all processes in one place, and tidies up there: ranks of one
    # job that do so at the same time take folders away from under each other.
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
