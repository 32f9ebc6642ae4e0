"""Starting a job: the engine, the GPU of this process, seeds, and this process's share of data."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._src.communicators.base import process_communicator
from syncbn._src.communicators.horovod import import_horovod, watch_elastic_job
from syncbn._src.communicators.launcher import cluster_task, is_elastic, launcher_engine
from syncbn._src.communicators.mpi import import_mpi
from syncbn._src.communicators.resolution import NAMES, choose_engine, resolve
from syncbn._src.keras_compat.keras_api import keras
from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit
from syncbn._src.training.horovod_initialization import init_horovod
from syncbn._src.watchdog.waiting_for_all import starting_within_limits, within_limits


class Job(NamedTuple):
    """The place of this process in a job. `start` returns it.

    Example:
        >>> job = syncbn.training.start()
        >>> job.rank, job.size, job.local_rank
        (0, 1, 0)
        >>> dataset = job.shard(tf.data.Dataset.range(4))
        >>> list(dataset.as_numpy_iterator()) == [0, 1, 2, 3]
        True
    """

    engine: str
    """The name of what joins the processes: a value of ``communicator=``."""
    rank: int
    """The number of this process, from 0."""
    size: int
    """The number of processes."""
    local_rank: int
    """The number of this process among those on its machine."""
    strategy: tf.distribute.Strategy | None = None
    """The strategy that joins the processes, if that is what joins them."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which models have to be created."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def shard(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Returns this process's share of a dataset: one element of ``size``.

        Call it before ``shuffle`` and ``batch``. The order has to be the same on all processes, or
        their shares overlap; a shuffle before it has another order on each, whatever seed it is
        given, once ``start(seed=)`` has given each process a seed of its own. Under tf.distribute,
        where the strategy shards what `fit` is given, the dataset is returned unchanged.

        The shares differ by one element where ``size`` does not divide the dataset. A worker that
        runs out of batches leaves the others waiting, so join them where their numbers may differ:
        ``training.join(job.shard(dataset).batch(8))``, called in `scope`; see `join`.

        Args:
            dataset: A `tf.data.Dataset`, whole.

        Raises:
            TypeError: it is something else.
        """
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(f"`dataset` must be a tf.data.Dataset. Received: dataset={dataset!r}.")
        return dataset if self.strategy is not None else dataset.shard(self.size, self.rank)


def start(engine: str = "auto", *, seed: int | None = None, own_gpu: bool = True) -> Job:
    """Joins this process to the others of its job. All processes call it, first in the script.

    - It initializes the engine: Horovod with the settings of `init_horovod`, MPI, or a
      `tf.distribute.MultiWorkerMirroredStrategy`, for whose `fit` it calls `mend_keras_fit`.
    - Over Horovod and MPI, this process gets the GPU of its number on the machine, and takes memory
      of it as needed. Where just one is visible, as where a launcher has chosen, it is that.
    - With a seed, it seeds Python, NumPy and TensorFlow. Under tf.distribute all processes need the
      same seed, to share out the same order of the data. Over Horovod and MPI each gets ``seed +
      rank``, so that they do not drop the same units or augment alike; `BroadcastVariables` starts
      them with the same weights all the same.

    A process that nobody has launched, as with a MirroredStrategy or without any, is rank 0 of 1,
    and keeps all of its GPUs. A second call returns the same; in an elastic job (see `elastic`)
    with the rank and the size that there are then. In such a job the first call starts TensorFlow
    too, so what is to be configured before that comes before this call. Its functions have to be
    those of `elastic`: with Horovod's own ``hvd.elastic.run``, a worker that joins would wait here
    for the others, which do not come.

    Args:
        engine: ``"horovod"``, ``"mpi"``, ``"tf.distribute"`` or ``"local"``. ``"auto"`` is the one
            that is initialized already, or else that of the launcher: of ``TF_CONFIG``, of
            ``horovodrun``, or MPI under ``mpirun`` and ``srun``; with MPI as the launcher it is
            Horovod where ``horovod.tensorflow`` has been imported.
        seed: The seed, or ``None`` to seed nothing.
        own_gpu: Whether to choose a GPU. False where each process is to use all GPUs that it sees,
            as with a MirroredStrategy in each.

    Returns:
        The place of this process: ``rank``, ``size``, ``local_rank``, ``strategy`` with its
        ``scope()``, and ``shard(dataset)``.

    Raises:
        ValueError: an unknown engine; ``TF_CONFIG`` does not describe a cluster and this process;
            this process sees several GPUs, and fewer than its machine has processes. (Where each
            sees just one, they may share it: a launcher that gives each its own looks the same.)
        ImportError: the engine is not installed.
        RuntimeError: TensorFlow has started, so that no GPU or strategy can be chosen; the engine
            does not see all processes that were launched.

    Example:
        >>> job = syncbn.training.start(seed=0)
        >>> with job.scope():
        ...     layer = syncbn.SyncBatchNormalization()
    """
    if engine not in NAMES:
        raise ValueError(
            f"`engine` must be one of {', '.join(map(repr, NAMES))}. Received: engine={engine!r}."
        )
    job = _joined(_detected() if engine == "auto" else engine, own_gpu)
    if job.engine == "horovod" and is_elastic():
        communicator = resolve("horovod")
        job = job._replace(rank=communicator.rank, size=communicator.size)
        # Here, where all have just met, and not where each of them begins to train.
        watch_elastic_job()
    if seed is not None:
        shared = job.strategy is not None
        keras.utils.set_random_seed(seed if shared else seed + job.rank)
    return job


def _detected() -> str:
    initialized = choose_engine()
    if initialized in ("horovod", "mpi"):
        return initialized
    found = launcher_engine()
    if found == "mpi" and "horovod.tensorflow" in sys.modules:
        return "horovod"
    return found or "local"


@functools.cache
def _joined(engine: str, own_gpu: bool) -> Job:
    if engine == "local":
        return Job(engine, 0, 1, 0)
    if engine == "tf.distribute":
        return _cluster()
    local_rank = _horovod_local_rank() if engine == "horovod" else _mpi_local_rank()
    # Before the engine's first message, with which TensorFlow starts.
    if own_gpu:
        _use_gpu(local_rank)
    communicator = process_communicator(resolve(engine))
    return Job(engine, communicator.rank, communicator.size, local_rank)


def _horovod_local_rank() -> int:
    hvd = import_horovod()
    if not hvd.is_initialized():
        # An elastic job has limits of Horovod's, which begins again without those that are late.
        limited = contextlib.nullcontext() if is_elastic() else within_limits("start")
        with limited:
            init_horovod()
    return hvd.local_rank()


def _mpi_local_rank() -> int:
    there = "mpi4py.MPI" in sys.modules
    with contextlib.nullcontext() if there else starting_within_limits():
        mpi = import_mpi()
    with within_limits("start", mpi.COMM_WORLD.Abort):
        machine = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank = machine.rank
    machine.Free()
    return local_rank


# A second strategy over the same devices would number its collectives from the start again, and
# TensorFlow would take them for those of the first.
@functools.cache
def _cluster() -> Job:
    task = cluster_task()
    if task is None:
        raise ValueError(
            "engine='tf.distribute' needs TF_CONFIG, which describes the cluster. Received: none. "
            "launch/multiworker.py sets it. For the devices of one process, create a "
            "tf.distribute.MirroredStrategy, and call start() without an engine."
        )
    mend_keras_fit()
    with starting_within_limits():
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    return Job("tf.distribute", task.rank, task.workers, task.local_rank, strategy)


def _use_gpu(local_rank: int) -> None:
    """Makes one GPU visible, that of a process's number on its machine."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    # A launcher may give each process one of its own, which is the first it sees.
    if 1 < len(gpus) <= local_rank:
        raise ValueError(
            f"Each process of a machine needs a GPU of its own. Received: {len(gpus)} GPUs, and "
            f"local rank {local_rank}. Start {len(gpus)} processes on each machine, or choose the "
            "GPUs yourself, with own_gpu=False."
        )
    own = gpus[local_rank if len(gpus) > 1 else 0]
    try:
        tf.config.set_visible_devices(own, "GPU")
        tf.config.experimental.set_memory_growth(own, True)
    except RuntimeError as error:  # "cannot be modified after being initialized"
        raise RuntimeError(
            "A GPU can be chosen only before TensorFlow starts. Received: a call of start() after "
            "something was computed, or a strategy was created. Make it the first call of the "
            "script, or choose the GPUs yourself, with own_gpu=False."
        ) from error
