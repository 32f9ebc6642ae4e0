"""Sessions of TensorFlow 1: `tests/sessions` in processes of their own, and what is refused."""

import re
import sys

import pytest

from tests import processes

SUITE = [sys.executable, "-m", "pytest", "--color=no", "-q", "-p", "no:cacheprovider"]

MPI = """
import tensorflow as tf
tf.compat.v1.disable_eager_execution()
from mpi4py import MPI
import syncbn
try:
    syncbn.SyncCentering()(tf.ones([2, 3]), training=True)
except NotImplementedError as error:
    assert "Use Horovod" in str(error), error
else:
    raise AssertionError("a collective whose order is not known")
assert syncbn.SyncCentering()(tf.ones([2, 3]), training=False).shape == (2, 3)
"""

KERAS_3 = """
import tensorflow as tf, syncbn
with tf.Graph().as_default():
    x = tf.ones([2, 3])
    try:
        syncbn.SyncCentering()(x, training=True)
    except NotImplementedError as error:
        assert "TF_USE_LEGACY_KERAS=1" in str(error), error
    else:
        raise AssertionError("updates that nobody runs")
"""


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("v2 behavior off", 1),
        ("a graph of its own", 1),
        ("eager execution off", 2),
    ],
)
def test_the_suite_passes_with(mode, size):
    command = [*SUITE, "tests/sessions"]
    if size > 1:
        command = processes.horovodrun(size, "gloo", *command)
    finished = processes.run(
        [(mode, command, {})],
        takes=30,
        env={
            "SYNCBN_TEST_SESSION": mode,
            "SYNCBN_TEST_ENGINE": "local" if size == 1 else "horovod",
            "TF_USE_LEGACY_KERAS": "1",
        },
    )
    assert finished.code == 0, finished.output
    # Not by lines, into which launchers may weave those of several ranks.
    assert len(re.findall(r"\d+ passed", finished.output)) == size, finished.output


def test_mpi_refuses_a_session():
    command = processes.mpirun(2, sys.executable, "-c", MPI)
    finished = processes.run([("mpirun", command, {})], env={"TF_USE_LEGACY_KERAS": "1"})
    assert finished.code == 0, finished.output


def test_keras_3_refuses_a_session():
    finished = processes.python(KERAS_3, TF_USE_LEGACY_KERAS="0")
    assert finished.code == 0, finished.output
