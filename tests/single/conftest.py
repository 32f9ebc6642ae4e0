"""Fixtures of the tests that run in one process."""

import functools

import pytest

# What imports TensorFlow, which takes seconds, is not imported where pytest-xdist only shares out.


@pytest.fixture(scope="session", autouse=True)
def _logical_devices():
    from tests import kinds_of_replicas as kinds

    kinds.use_logical_devices(8)


@pytest.fixture(scope="session")
def mirrored():
    """Gives the replicas of a MirroredStrategy over so many logical CPU devices."""
    from tests import kinds_of_replicas as kinds

    return functools.cache(kinds.mirrored)


@pytest.fixture(scope="module", autouse=True)
def _unseeded():
    """Lets no module draw the numbers that another one has asked for: they share processes."""
    yield
    import tensorflow as tf

    tf.random.set_seed(None)
