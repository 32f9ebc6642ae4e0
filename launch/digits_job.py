"""The replicas that `train_digits` trains on: how they are set up, and which of them this is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from syncbn import training

ENGINES = ("mirrored", "multiworker", "horovod", "mpi")


class DigitsJob(NamedTuple):
    """The engine that joins the replicas, and the place of this process among them."""

    engine: str
    replicas: int
    """The number in all processes together."""
    rank: int = 0
    """That of this process."""
    processes: int = 1
    strategy: tf.distribute.Strategy | None = None

    @property
    def replicas_here(self) -> int:
        """The number of replicas in this process."""
        return self.replicas // self.processes

    def __str__(self) -> str:
        replicas = "1 replica" if self.replicas == 1 else f"{self.replicas} replicas"
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.engine}, {replicas} in {processes}"

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which a model has to be created."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def share(self, batch: int) -> slice:
        """Returns which samples of a batch this process reads: its part of an even split."""
        ends = np.linspace(0, batch, self.processes + 1).astype(int)
        return slice(ends[self.rank], ends[self.rank + 1])


ALONE = DigitsJob("none", 1)


def detect_engine() -> str:
    """Returns the engine that the environment indicates, by the variables that launchers set.

    ``horovodrun --mpi``, and so ``horovodrun`` alone where Horovod was built with MPI, starts the
    job with ``mpirun`` and sets no variable of Horovod's: it is taken for a job of MPI.
    """
    if os.environ.get("TF_CONFIG"):
        return "multiworker"
    if "HOROVOD_SIZE" in os.environ:
        return "horovod"
    # srun sets 1 in an interactive shell, too.
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if several or {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & os.environ.keys():
        return "mpi"
    return "mirrored"


@functools.cache
def start(engine: str, replicas: int | None) -> DigitsJob:
    """Joins the processes of the job; every one of them makes this call, before it computes.

    One call for all runs: a second strategy over the same devices would number its collectives from
    the start again, and TensorFlow would take them for those of the first.

    Args:
        engine: One of `ENGINES`.
        replicas: Those of ``mirrored``: GPUs, or logical devices of the CPU; the others have one in
            each process.

    Raises:
        SystemExit: the environment does not describe such a job.
    """
    if engine == "mirrored":
        return _mirrored(8 if replicas is None else replicas)
    if engine == "multiworker":
        strategy = _multiworker()
        resolver = strategy.cluster_resolver
        count = len(resolver.cluster_spec().as_dict()["worker"])
        job = DigitsJob(engine, strategy.num_replicas_in_sync, resolver.task_id, count, strategy)
    elif engine == "horovod":
        import horovod.tensorflow as hvd

        training.init_horovod()
        job = DigitsJob(engine, hvd.size(), hvd.rank(), hvd.size())
        _use_own_gpu(hvd.local_rank())
    else:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        job = DigitsJob(engine, world.size, world.rank, world.size)
        _use_own_gpu(world.Split_type(MPI.COMM_TYPE_SHARED).rank)
    if replicas not in (None, job.replicas):
        raise SystemExit(
            f"--replicas {replicas}: the launcher has started {job.replicas}. Leave it out, or "
            "start as many."
        )
    return job


def require_same_arguments(job: DigitsJob, arguments: dict[str, object]) -> None:
    """Compares the arguments of the job's processes.

    Raises:
        SystemExit: they differ from those of rank 0.
    """
    text = repr(sorted(arguments.items()))
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    of_rank_0 = tf.Variable(own)
    if job.strategy is None:
        training.broadcast(of_rank_0, communicator="local" if job is ALONE else "auto")
    if not np.array_equal(own, of_rank_0.numpy()):
        raise SystemExit(f"Rank {job.rank} was started with other arguments than rank 0: {text}")


@contextlib.contextmanager
def ending_all(job: DigitsJob) -> Iterator[None]:
    """Ends the processes of an MPI job together when this one fails.

    MPI waits for all of them when one wants to end, even where they wait for a message from it.
    Other launchers end them themselves. (``python -m mpi4py script.py`` does the same.)
    """
    try:
        yield
    except BaseException as error:
        if job.engine == "mpi" and job.processes > 1:
            from mpi4py import MPI

            if isinstance(error, SystemExit):
                print(error, file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
            MPI.COMM_WORLD.Abort(1)
        raise


def _mirrored(replicas: int) -> DigitsJob:
    if replicas == 1:
        return ALONE
    kind = "GPU"
    if len(tf.config.list_physical_devices("GPU")) < replicas:
        kind = "CPU"
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * replicas,
        )
        # Turns off the tuning of data pipelines. It has a thread for each replica, and stopping
        # these, wherever an epoch or a test ends, was seen to take 20 s.
        tf.data.experimental.enable_debug_mode()
    strategy = tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(replicas)])
    return DigitsJob("mirrored", replicas, strategy=strategy)


def _multiworker() -> tf.distribute.Strategy:
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG", ""))
        workers, index = cluster["cluster"]["worker"], cluster["task"]["index"]
        if cluster["task"]["type"] != "worker" or not 0 <= index < len(workers):
            raise ValueError(f"task {cluster['task']} is none of {len(workers)} workers")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            "TF_CONFIG must describe a cluster of workers, and the task of this one. Received: "
            f"TF_CONFIG={os.environ.get('TF_CONFIG')!r} ({error!r}). launch/multiworker.py sets it."
        ) from error
    training.mend_keras_fit()
    return tf.distribute.MultiWorkerMirroredStrategy()


def _use_own_gpu(local_rank: int) -> None:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[local_rank % len(gpus)], "GPU")
