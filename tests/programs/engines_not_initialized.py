"""Horovod and MPI that nobody has initialized, or not for threads: errors that say what to call."""

import mpi4py

mpi4py.rc.initialize = False

import horovod.tensorflow  # noqa: E402, F401  (before MPI, and imported but not initialized)
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mpi4py import MPI  # noqa: E402

import syncbn  # noqa: E402


def refused(communicator, message):
    layer = syncbn.SyncBatchNormalization(communicator=communicator)
    with pytest.raises(RuntimeError, match=message):
        layer(np.ones((2, 3), "float32"), training=True)


refused("horovod", r"Call hvd\.init\(\)")
refused("mpi", r"Call mpi4py\.MPI\.Init\(\)")
MPI.Init_thread(MPI.THREAD_FUNNELED)
refused("mpi", "THREAD_SERIALIZED at least")
MPI.Finalize()
