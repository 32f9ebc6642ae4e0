"""The replicas that `train_digits` trains on."""

from __future__ import annotations

import contextlib
import hashlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from syncbn import training

ENGINES = {"mirrored": "local", "multiworker": "tf.distribute", "horovod": "horovod", "mpi": "mpi"}
"""What ``--engine`` takes, and what joins the processes then."""


class DigitsJob(NamedTuple):
    """The replicas of all processes together, and this process."""

    engine: str
    replicas: int
    process: training.Job
    strategy: tf.distribute.Strategy | None = None

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.process.rank

    @property
    def processes(self) -> int:
        """Their number."""
        return self.process.size

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


ALONE = DigitsJob("none", 1, training.start("local"))


def start_replicas(engine: str, replicas: int | None) -> DigitsJob:
    """Joins the processes of the job; every one of them makes this call, before it computes.

    Args:
        engine: One of `ENGINES`, or ``"auto"``.
        replicas: Those of ``mirrored``: GPUs, or logical devices of the CPU; the others have one in
            each process.

    Raises:
        SystemExit: the launcher has started another number of them.
    """
    process = training.start(ENGINES.get(engine, engine))
    if process.engine == "local":
        return _mirrored(8 if replicas is None else replicas, process)
    strategy = process.strategy
    started = process.size if strategy is None else strategy.num_replicas_in_sync
    if replicas not in (None, started):
        raise SystemExit(
            f"--replicas {replicas}: the launcher has started {started}. Leave it out, or start as "
            "many."
        )
    names = {joins: name for name, joins in ENGINES.items()}
    return DigitsJob(names[process.engine], started, process, strategy)


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


def _mirrored(replicas: int, process: training.Job) -> DigitsJob:
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
    return DigitsJob("mirrored", replicas, process, strategy)
