"""The replicas that `train_digits` trains on."""

from __future__ import annotations

import contextlib
import hashlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import syncbn
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
        SystemExit: some have other ones than rank 0. Raised on all, as none could go on alone.
    """
    text = repr(sorted(arguments.items()))
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    rows = np.zeros((job.processes, len(digest)))
    rows[job.rank] = digest
    rows = _sum(job, rows)
    others = [str(rank) for rank, row in enumerate(rows) if not np.array_equal(row, rows[0])]
    if others:
        raise SystemExit(
            f"Rank {', '.join(others)} was started with other arguments than rank 0. "
            f"Those of rank {job.rank}: {text}"
        )


def _sum(job: DigitsJob, own: np.ndarray) -> np.ndarray:
    """Returns the sum over the processes."""
    if job.processes == 1:
        return own

    def total() -> tf.Tensor:
        communicator = syncbn.resolve()
        return communicator.all_reduce_sum(tf.constant(own / job.replicas_here), "digits")

    if job.strategy is None:
        return total().numpy()
    return job.strategy.experimental_local_results(job.strategy.run(total))[0].numpy()


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
