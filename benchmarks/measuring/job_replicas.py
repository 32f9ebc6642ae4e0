"""The replicas of a job, from inside one of its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import tensorflow as tf

SHARED = {"mirrored": "CPU", "mirrored-gpu": "GPU"}
"""By engine: the kind of the one device that its replicas are logical parts of."""
GPU_MEMORY = 3072
"""MB of each part of a GPU. The largest case takes 0.9 GB on a part of a CPU; two fit into 8 GB."""


class JobReplicas:
    """All replicas of the job that this process is part of; every process creates one, first.

    Args:
        engine: A key of `jobs.ENGINES`.
        workers: The number that there must be.

    Raises:
        RuntimeError: there are more or fewer.
    """

    def __init__(self, engine: str, workers: int):
        self.strategy: tf.distribute.Strategy | None = None
        self.rank, size = 0, 1
        self.meet: Callable[[], object] = lambda: None
        """Waits for the other processes."""
        self._on_gpu = engine == "mirrored-gpu"
        if engine in SHARED:
            kind = SHARED[engine]
            limit = GPU_MEMORY if kind == "GPU" else None
            parts = [tf.config.LogicalDeviceConfiguration(memory_limit=limit)] * workers
            device = tf.config.list_physical_devices(kind)[0]
            tf.config.set_logical_device_configuration(device, parts)
            # NCCL refuses two parts of one GPU; summing on one of them is the simplest way out.
            reduction = tf.distribute.ReductionToOneDevice() if self._on_gpu else None
            self.strategy = tf.distribute.MirroredStrategy(
                [f"{kind}:{i}" for i in range(workers)], reduction
            )
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
        """Returns the context in which layers have to be created."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def normal(self, shapes: Sequence[tuple[int, ...]], dtype: tf.DType, seed: int) -> list:
        """Returns normally distributed tensors, different ones on each replica."""

        def values(shape: tuple[int, ...], number: int, replica: int) -> tf.Tensor:
            key = [seed, 1000 * replica + number]
            # On the device that uses them, or each step would begin with a copy.
            with tf.device(devices[replica % len(devices)]):
                return tf.cast(tf.random.stateless_normal(shape, key), dtype)

        devices = self.strategy.extended.worker_devices if self.strategy else [None]
        if self.strategy is None:
            return [values(shape, i, self.rank) for i, shape in enumerate(shapes)]
        return [
            self.strategy.experimental_distribute_values_from_function(
                lambda context, shape=shape, i=i: values(shape, i, context.replica_id_in_sync_group)
            )
            for i, shape in enumerate(shapes)
        ]

    def run(self, function: Callable, *arguments: object) -> object:
        """Calls a function on every replica of this process, and waits for its results."""
        if self.strategy is None:
            return function(*arguments)
        return self.strategy.run(_awaited(function) if self._on_gpu else function, args=arguments)

    def _barrier(self) -> Callable[[], object]:
        one = self.normal([(1,)], tf.float32, 0)[0]

        def add(value: tf.Tensor) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_reduce("sum", value)

        return tf.function(lambda: self.strategy.run(add, args=(one,)))


def _awaited(function: Callable) -> Callable:
    """Returns ``function`` with a wait at its end: a GPU's operations return before it is done."""

    def call(*arguments: object) -> object:
        results = function(*arguments)
        with tf.control_dependencies(tf.nest.flatten(results)):
            tf.raw_ops.SyncDevice()
        return results

    return call
