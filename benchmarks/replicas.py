"""The replicas of a job, from inside one of its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import tensorflow as tf


class Replicas:
    """All replicas of the job that this process is part of; every process makes one, first.

    Args:
        engine: A key of `jobs.ENGINES`.
        workers: How many there have to be.

    Raises:
        RuntimeError: there are more or fewer.
    """

    def __init__(self, engine: str, workers: int):
        self.strategy: tf.distribute.Strategy | None = None
        self.rank, size = 0, 1
        self.meet: Callable[[], object] = lambda: None
        """Waits for the other processes."""
        if engine == "mirrored":
            cpu = tf.config.list_physical_devices("CPU")[0]
            parts = [tf.config.LogicalDeviceConfiguration()] * workers
            tf.config.set_logical_device_configuration(cpu, parts)
            self.strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(workers)])
        elif engine == "multiworker":
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
            self.rank = self.strategy.cluster_resolver.task_id
            self.meet = self._barrier()
        elif engine.startswith("horovod"):
            import horovod.tensorflow as hvd

            hvd.init()
            self.rank, size = hvd.rank(), hvd.size()
            self.meet = lambda: hvd.allreduce(tf.zeros([1]), name="meet")
        elif engine == "mpi":
            from mpi4py import MPI

            self.rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
            self.meet = MPI.COMM_WORLD.Barrier
        if self.strategy:
            size = self.strategy.num_replicas_in_sync
        if size != workers:
            raise RuntimeError(f"The job needs {workers} replicas. Received: {size}.")

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which layers have to be made."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def normal(self, shapes: Sequence[tuple[int, ...]], dtype: tf.DType, seed: int) -> list:
        """Returns normally distributed tensors, other ones on each replica."""

        def values(shape: tuple[int, ...], number: int, replica: int) -> tf.Tensor:
            key = [seed, 1000 * replica + number]
            return tf.cast(tf.random.stateless_normal(shape, key), dtype)

        if self.strategy is None:
            return [values(shape, i, self.rank) for i, shape in enumerate(shapes)]
        return [
            self.strategy.experimental_distribute_values_from_function(
                lambda context, shape=shape, i=i: values(shape, i, context.replica_id_in_sync_group)
            )
            for i, shape in enumerate(shapes)
        ]

    def run(self, function: Callable, *arguments: object) -> object:
        """Calls a function on every replica of this process."""
        if self.strategy is None:
            return function(*arguments)
        return self.strategy.run(function, args=arguments)

    def _barrier(self) -> Callable[[], object]:
        one = self.normal([(1,)], tf.float32, 0)[0]

        def add(value: tf.Tensor) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_reduce("sum", value)

        return tf.function(lambda: self.strategy.run(add, args=(one,)))
