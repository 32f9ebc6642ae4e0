"""The suite that runs on every engine: a launcher runs it in each rank, with the same arguments.

``SYNCBN_TEST_ENGINE`` names the engine: ``mirrored:N`` (in one process), ``multiworker``,
``horovod`` or ``mpi``, ``horovod+mirrored:N`` or ``mpi+mirrored:N`` (N replicas in each process).
`tests/launchers/test_suite.py` starts them all. ``local`` is one replica, for `test_clustering.py`.

With ``SYNCBN_TEST_CLUSTERS`` XLA compiles what it can: see `tests/clusters.py`.
"""

import faulthandler
import os

import pytest

from tests import clusters, patience  # noqa: F401  (clusters before TensorFlow starts)
from tests import kinds_of_replicas as kinds

ENGINE, _, SIZE = os.environ.get("SYNCBN_TEST_ENGINE", "mirrored:2").partition(":")


def pytest_configure(config):
    # A rank that waits for one which has failed shows where it waits, and ends. Where
    # tests/processes.py starts it, its limit is a little longer.
    limit = os.environ.get("SYNCBN_TEST_LIMIT") or patience.limit(30)
    faulthandler.dump_traceback_later(float(limit), exit=True)


def pytest_unconfigure(config):
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def replicas():
    """The replicas that the engine joins."""
    if ENGINE == "multiworker":
        return kinds.multiworker()
    if ENGINE == "local":
        return kinds.Process(0, 1)
    across, *mirrored = ENGINE.split("+")
    if across == "mirrored" or mirrored:
        kinds.use_logical_devices(int(SIZE) + len(mirrored))  # some processes may have one more
    if across == "mirrored":
        return kinds.mirrored(int(SIZE))
    if across == "horovod":
        import horovod.tensorflow as hvd

        from syncbn import training

        training.init_horovod(process_sets="dynamic")
        # Process sets of a user's own: Horovod takes none of the same processes again.
        alone = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
        process = kinds.Process(hvd.rank(), hvd.size(), alone)
    elif across == "mpi":
        from mpi4py import MPI

        process = kinds.Process(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    else:
        raise pytest.UsageError(f"SYNCBN_TEST_ENGINE: unknown engine {ENGINE!r}")
    return kinds.nested(int(SIZE), process) if mirrored else process


@pytest.fixture
def engine():
    across, *_ = ENGINE.split("+")
    return {"mirrored": "tf.distribute", "multiworker": "tf.distribute"}.get(across, across)
