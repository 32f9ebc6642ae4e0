"""The suite for sessions of TensorFlow 1: `tests/launchers/test_sessions.py` runs it.

Eager execution is switched off for a whole process, so each way of doing so has its own.
``SYNCBN_TEST_SESSION`` names it, ``SYNCBN_TEST_ENGINE`` the engine, ``local`` or ``horovod``.
"""

import faulthandler
import os
from typing import NamedTuple

import pytest
import tensorflow as tf

v1 = tf.compat.v1

# Before Keras is loaded, as a script of TensorFlow 1 does.
{
    "eager execution off": v1.disable_eager_execution,
    "v2 behavior off": v1.disable_v2_behavior,
    "a graph of its own": lambda: None,
}[os.environ["SYNCBN_TEST_SESSION"]]()


class Workers(NamedTuple):
    """Which of the processes this is."""

    rank: int
    size: int

    def part(self, batch):
        """Returns this worker's part of a batch: all but two samples are the first worker's."""
        splits = {1: [len(batch)], 2: [len(batch) - 2, 2]}[self.size]
        start = sum(splits[: self.rank])
        return batch[start : start + splits[self.rank]]


def pytest_configure(config):
    # A rank that waits for one which has failed shows where it waits, and ends.
    faulthandler.dump_traceback_later(float(os.environ["SYNCBN_TEST_LIMIT"]), exit=True)


def pytest_unconfigure(config):
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def workers():
    if os.environ["SYNCBN_TEST_ENGINE"] == "local":
        return Workers(0, 1)
    import horovod.tensorflow as hvd

    hvd.init()
    return Workers(hvd.rank(), hvd.size())


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture
def run(graph):
    """Runs fetches in one session, whose variables are initialized at the first run."""
    with v1.Session() as session:
        started = []

        def run(fetches, feed=None):
            if not started:
                started.append(session.run(v1.global_variables_initializer()))
            return session.run(fetches, feed)

        run.session = session
        yield run
