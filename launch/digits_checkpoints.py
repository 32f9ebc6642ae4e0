"""The checkpoints of `train_digits`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf
from digits_job import DigitsJob

from syncbn import training

_UNREADABLE = -1
"""In place of the epoch, where rank 0 cannot go on: the others would wait for it."""


class Checkpoints(tf.keras.callbacks.Callback):
    """Saves model, optimizer and epoch after each epoch, and finds them again.

    Rank 0 writes. Over Horovod and MPI it alone reads, too, and tells the others; under
    MultiWorkerMirroredStrategy all workers read, and so need to see the folder.
    """

    def __init__(self, folder: Path, model: tf.keras.Model, job: DigitsJob) -> None:
        super().__init__()
        with job.scope():
            model.optimizer.build(model.trainable_variables)
        self._epoch = tf.Variable(0, dtype=tf.int64)
        self._checkpoint = tf.train.Checkpoint(
            model=model, optimizer=model.optimizer, epoch=self._epoch
        )
        self._folder, self._job = folder, job
        own = folder
        if job.rank and job.strategy is not None:
            # Saving reads the moving statistics, which under a strategy takes all workers.
            self._discarded = tempfile.TemporaryDirectory()
            own = Path(self._discarded.name)
        self._manager = tf.train.CheckpointManager(self._checkpoint, str(own), max_to_keep=2)

    def restore(self) -> int:
        """Restores the last checkpoint, if there is one, and returns the epochs that it has seen.

        Raises:
            SystemExit: it is not one of this model and optimizer. Raised on all workers.
        """
        separate = self._job.processes > 1 and self._job.strategy is None
        fault = ""
        path = tf.train.latest_checkpoint(str(self._folder))
        if path and not (separate and self._job.rank):
            try:
                self._checkpoint.restore(path).assert_consumed()
            except (AssertionError, ValueError, tf.errors.OpError) as error:
                reason = str(error).partition("\n")[0]
                fault = f"{path} ({reason})"
                self._epoch.assign(_UNREADABLE)
        if separate:
            # The callback BroadcastVariables does the same for all the rest.
            training.broadcast(self._epoch)
        if self._epoch.numpy() == _UNREADABLE:
            raise SystemExit(
                "--checkpoint must hold checkpoints of this network and optimizer. "
                f"Received: {fault or 'others, as rank 0 says'}. Name another folder."
            )
        return int(self._epoch.numpy())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epoch.assign(epoch + 1)
        if self._job.rank == 0 or self._job.strategy is not None:
            self._manager.save()
