"""What `python -m syncbn doctor` starts in two processes, to try an engine out.

Each process runs ``python -m syncbn._src.doctor.probe ENGINE FILE``. It fails where the engine does
not join them, or sums wrongly; otherwise the first writes the latency of an all-reduce, in seconds,
into the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.horovod import HorovodCommunicator
from syncbn._src.communicators.mpi import MPICommunicator
from syncbn._src.communicators.tf_distribute import DistributeCommunicator
from syncbn._src.layers.sync_batch_normalization import SyncBatchNormalization
from syncbn._src.models.training_job import TrainingJob

_SPLIT = (3, 5)
"""Replicas with batches of different sizes."""


def main() -> None:
    """Tries the engine out."""
    engine, file = sys.argv[1:]
    job = _join(engine)
    if job.size != len(_SPLIT):
        raise RuntimeError(f"{engine} joins {job.size} process(es), of {len(_SPLIT)} started.")
    _check_sum(job)
    _check_layer(job)
    seconds = job.latency(129, tf.float64)
    if 0 in job.ranks:
        Path(file).write_text(repr(seconds))


def _join(engine: str) -> TrainingJob:
    if engine == "mirrored":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        return TrainingJob(DistributeCommunicator(), strategy)
    if engine == "multiworker":
        return TrainingJob(DistributeCommunicator(), tf.distribute.MultiWorkerMirroredStrategy())
    if engine == "mpi":
        return TrainingJob(MPICommunicator())
    import horovod.tensorflow as hvd

    hvd.init()
    return TrainingJob(HorovodCommunicator())


def _check_sum(job: TrainingJob) -> None:
    vectors = [np.array([rank + 0.5, 7.0]) for rank in range(job.size)]
    (total,), *_ = job.run(
        lambda own: job.communicator.all_reduce_sum(own, "syncbn/probe"),
        [vectors[rank] for rank in job.ranks],
    )
    np.testing.assert_array_equal(total, sum(vectors), "An all-reduce gives a wrong sum.")


def _check_layer(job: TrainingJob) -> None:
    """Compares a training step of a layer with NumPy's, on the whole batch."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(3, 2, size=(2, sum(_SPLIT), 4)).astype("float32")
    with job.scope():
        layer = SyncBatchNormalization(epsilon=0.0, communicator=job.communicator)
        layer.build((None, 4))

    def step(both: tf.Tensor) -> Any:
        own, upstream = tf.unstack(both)
        with tf.GradientTape() as tape:
            tape.watch(own)
            y = layer(own, training=True)
        return y, tape.gradient(y, own, upstream)

    parts = np.split(np.stack([x, dy]), [_SPLIT[0]], axis=1)
    results = job.run(step, [parts[rank] for rank in job.ranks])

    deviation = x.std(0)
    y = (x - x.mean(0)) / deviation
    dx = (dy - dy.mean(0) - y * (dy * y).mean(0)) / deviation
    expected = np.split(np.stack([y, dx]), [_SPLIT[0]], axis=1)
    for rank, result in zip(job.ranks, results, strict=True):
        message = f"SyncBatchNormalization is wrong on rank {rank}."
        np.testing.assert_allclose(result, expected[rank], rtol=1e-3, atol=1e-4, err_msg=message)


if __name__ == "__main__":
    main()
