"""The launcher has started two processes, and each engine knows of one: an error."""

import os

import horovod.tensorflow as hvd
import numpy as np
import pytest
from mpi4py import MPI  # noqa: F401  (which initializes it)

import syncbn

hvd.init()
os.environ["PMI_SIZE"] = "2"
for communicator in ("horovod", "mpi", "auto"):
    layer = syncbn.SyncCentering(communicator=communicator)
    with pytest.raises(RuntimeError, match="PMI_SIZE says that 2 processes were started"):
        layer(np.ones((2, 3), "float32"), training=True)
