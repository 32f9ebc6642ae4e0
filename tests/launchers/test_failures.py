"""Jobs that are started wrongly end soon, and say why. (test_training.py kills workers.)"""

import sys

import pytest

from tests import processes

UNUSABLE_ENGINES = """
import os, numpy, tensorflow as tf, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import horovod.tensorflow as hvd
import syncbn

def message(communicator):
    layer = syncbn.SyncBatchNormalization(communicator=communicator)
    try:
        layer(numpy.ones((2, 3), "float32"), training=True)
    except RuntimeError as error:
        return str(error)

assert "Call hvd.init()" in message("horovod"), message("horovod")
assert "Call mpi4py.MPI.Init()" in message("mpi"), message("mpi")

MPI.Init_thread(MPI.THREAD_FUNNELED)
assert "THREAD_SERIALIZED at least" in message("mpi"), message("mpi")
MPI.Finalize()
"""

ONE_PROCESS_OF_SEVERAL = """
import numpy, tensorflow as tf
import horovod.tensorflow as hvd
from mpi4py import MPI
import syncbn

hvd.init()
import os
os.environ["PMI_SIZE"] = "2"
for communicator in ("horovod", "mpi", "auto"):
    try:
        layer = syncbn.SyncCentering(communicator=communicator)
        layer(numpy.ones((2, 3), "float32"), training=True)
    except RuntimeError as error:
        assert "PMI_SIZE says that 2 processes were started" in str(error), error
    else:
        raise AssertionError(communicator)
"""

PARAMETER_SERVER = """
import numpy, socket, tensorflow as tf, syncbn

with socket.socket() as one, socket.socket() as other:
    one.bind(("127.0.0.1", 0)); other.bind(("127.0.0.1", 0))
    worker, server = (f"127.0.0.1:{s.getsockname()[1]}" for s in (one, other))
cluster = tf.train.ClusterSpec({"worker": [worker], "ps": [server]})
servers = [tf.distribute.Server(cluster, job, 0, start=True) for job in ("worker", "ps")]
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
strategy = tf.distribute.ParameterServerStrategy(resolver)
with strategy.scope():
    layer = syncbn.SyncBatchNormalization()
    layer.build((None, 3))
import json, os
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": [worker, worker], "ps": [server]}})
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
try:
    coordinator.schedule(tf.function(lambda: layer(tf.ones([2, 3]), training=True)))
    coordinator.join()
except RuntimeError as error:
    assert "under ParameterServerStrategy, whose workers are asynchronous" in str(error), error
    print("refused", flush=True)
import os
os._exit(0)  # the servers have no end of their own
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(UNUSABLE_ENGINES, id="not initialized"),
        pytest.param(ONE_PROCESS_OF_SEVERAL, id="one process of several"),
    ],
)
def test_an_engine_that_cannot_synchronize_is_refused(code):
    # Open MPI from PyPI finds itself only through its mpirun.
    command = processes.mpirun(1, sys.executable, "-c", code)
    finished = processes.run([("mpirun", command, {})])
    assert finished.code == 0, finished.output


def test_parameter_servers_are_refused():
    finished = processes.python(PARAMETER_SERVER)
    assert finished.code == 0, finished.output
    assert "refused" in finished.output, finished.output
