"""Callbacks of one worker only."""

from __future__ import annotations

from typing import Any

from syncbn._src.communicators.base import Communicator, process_communicator
from syncbn._src.communicators.launcher import cluster_task
from syncbn._src.communicators.resolution import choose_engine, resolve
from syncbn._src.keras_compat import keras_api


def rank_zero_only(*callbacks: Any, communicator: str | Communicator = "auto") -> list[Any]:
    """Returns the callbacks on rank 0, and nothing on other workers.

    They are those that write: logs, pictures, checkpoints. What steers training (`EarlyStopping`,
    learning rates) and what communicates must be on all workers.

    Under MultiWorkerMirroredStrategy, reading a non-trainable weight, such as a moving mean, takes
    all workers, and rank 0 alone would wait for the others forever. So none of the callbacks may
    read, save or summarize these there. Those of Keras that do are refused; yours are not known.

    Args:
        callbacks: For `Model.fit`.
        communicator: As for `syncbn.SyncBatchNormalization`. ``"auto"`` also finds the worker in a
            cluster of tf.distribute by ``TF_CONFIG``, outside of its strategy's scope.

    Raises:
        ValueError: in a cluster of several workers, a callback of Keras that reads all weights:
            `ModelCheckpoint`, `BackupAndRestore`, and `TensorBoard` with histograms or embeddings.
        RuntimeError: see `syncbn.resolve`.

    Example:
        >>> own = syncbn.training.rank_zero_only(tf.keras.callbacks.CSVLogger("log.csv"))
        >>> callbacks = [syncbn.training.AverageMetrics(), *own]
    """
    automatic = communicator == "auto"
    engine = choose_engine() if automatic else getattr(communicator, "name", communicator)
    in_cluster = engine == "tf.distribute" or (automatic and engine == "local")
    task = cluster_task() if in_cluster else None
    if task is not None:
        _require_no_reading(callbacks, task.workers)
        return list(callbacks) if task.rank == 0 else []
    resolved = process_communicator(resolve(communicator))
    # Without a cluster, a strategy has one process.
    rank = 0 if resolved.name == "tf.distribute" else resolved.rank
    return list(callbacks) if rank == 0 else []


def _require_no_reading(callbacks: Any, workers: int) -> None:
    for callback in callbacks:
        if workers > 1 and _reads_all_weights(callback):
            raise ValueError(
                "Saving or summarizing a model reads moving statistics, which all workers of "
                "MultiWorkerMirroredStrategy do together. Received: "
                f"{type(callback).__name__} for rank 0 only. Give it to all workers, each with a "
                "path of its own; or leave out TensorBoard's histogram_freq and embeddings_freq."
            )


def _reads_all_weights(callback: Any) -> bool:
    of_keras = keras_api.keras.callbacks
    if isinstance(callback, of_keras.TensorBoard):
        return bool(callback.histogram_freq or callback.embeddings_freq)
    return isinstance(callback, of_keras.ModelCheckpoint | of_keras.BackupAndRestore)
