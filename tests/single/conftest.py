"""Fixtures of the tests that run in one process."""

import functools

import pytest

from tests import replicas


@pytest.fixture(scope="session", autouse=True)
def _logical_devices():
    replicas.use_logical_devices(8)


@pytest.fixture(scope="session")
def mirrored():
    """Gives the replicas of a MirroredStrategy over so many logical CPU devices."""
    return functools.cache(replicas.mirrored)
