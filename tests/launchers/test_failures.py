"""Jobs that are started wrongly, and jobs whose workers die: a clear end, soon, and no orphans."""

import os
import sys
import uuid
from pathlib import Path

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

DYING = """
import os, signal, sys
engine = sys.argv[1]
if engine == "multiworker":
    import tensorflow as tf
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    rank = strategy.cluster_resolver.task_id
elif engine == "mpi":
    import tensorflow as tf
    from mpi4py import MPI
    rank = MPI.COMM_WORLD.rank
else:
    import horovod.tensorflow as hvd
    import tensorflow as tf
    hvd.init()
    rank = hvd.rank()
import contextlib, syncbn
with strategy.scope() if engine == "multiworker" else contextlib.nullcontext():
    layer = syncbn.SyncBatchNormalization()
    layer.build((None, 3))

@tf.function
def step():
    call = lambda: layer(tf.ones([2, 3]), training=True)
    return strategy.run(call) if engine == "multiworker" else call()

for number in range(100):
    step()
    if (number, rank) == (5, 1):
        print("rank 1 dies", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
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
    finished = processes.run([("mpirun", command, {})], limit=60)
    assert finished.code == 0, finished.output


def test_parameter_servers_are_refused():
    finished = processes.python(PARAMETER_SERVER)
    assert finished.code == 0, finished.output
    assert "refused" in finished.output, finished.output


@pytest.mark.parametrize("launcher", ["mpi", "horovod-gloo", "horovod-mpi", "multiworker"])
def test_a_job_whose_worker_dies_ends_soon_and_leaves_nobody_behind(launcher):
    marker = f"dying-{uuid.uuid4().hex}"
    engine, _, controller = launcher.partition("-")
    command = [sys.executable, "-c", DYING, engine, marker]
    if engine == "multiworker":
        commands = processes.workers(2, *command)
    elif engine == "mpi":
        commands = [("mpirun", processes.mpirun(2, *command), {})]
    else:
        commands = [("horovodrun", processes.horovodrun(2, controller, *command), {})]
    finished = processes.run(commands, limit=90)
    assert "rank 1 dies" in finished.output, finished.output
    assert "ended after the limit" not in finished.output, finished.output
    assert finished.code != 0, finished.output
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and marker in _command_line(pid)]
    assert not left, f"processes {left} are still there"


def _command_line(pid):
    try:
        return Path("/proc", pid, "cmdline").read_text(errors="replace")
    except OSError:
        return ""  # it has ended meanwhile
