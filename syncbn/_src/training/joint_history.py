"""What the workers of a `fit` agree on: where to begin, when to stop, and that they are alike."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator, joins_by_messages
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.communicators.mpi import MPICommunicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.disguised_classes import disguised_class
from syncbn._src.keras_compat.layer_names import full_name
from syncbn._src.keras_compat.optimizer_state import current_rate
from syncbn._src.training.kept_local import shared_variables
from syncbn._src.training.model_optimizers import optimizers_of


def train_jointly(model: Any, communicator: Communicator, same_weights: bool) -> None:
    """Makes the workers of the `fit` that begins agree, see `_JointHistory`.

    Args:
        model: What is fitted.
        communicator: What joins the workers.
        same_weights: Whether gradients must leave all workers with the same weights.
    """
    # Keras puts it behind the callbacks that it is given, so it is the one that has seen what all
    # of them did. There is none where callbacks are called by hand.
    history = getattr(model, "history", None)
    in_fit = isinstance(history, keras_api.keras.callbacks.History)
    if not in_fit or not joins_by_messages(communicator):
        return
    changed: Any = history
    if not isinstance(history, _JointHistory):
        changed.__class__ = disguised_class(_JointHistory, changed.__class__)
        changed._syncbn_communicator = communicator
        changed._syncbn_same_weights = False
        changed._syncbn_begun = False
        changed._syncbn_batches = 0
    changed._syncbn_same_weights |= same_weights


class _JointHistory:
    """The history of a `fit` whose workers begin and stop together.

    All workers must begin at the same epoch. At the end of each epoch all workers stop if one of
    them would. Over MPI, where that takes a tenth of a millisecond, it is so after each batch.
    Learning rates and, if they must be, weights are compared at the end of each epoch; weights also
    after the first two batches, of which the first may be that which makes the optimizer's state.
    """

    _plain_class: type
    _syncbn_communicator: Communicator
    _syncbn_same_weights: bool
    _syncbn_begun: bool
    _syncbn_batches: int
    model: Any

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)  # type: ignore[misc]
        self._begin(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(batch, logs)  # type: ignore[misc]
        self._syncbn_batches += 1
        if self._syncbn_same_weights and self._syncbn_batches <= 2:
            self._agree("step", self._syncbn_batches)
        elif isinstance(self._syncbn_communicator, MPICommunicator):
            stop = tf.constant([float(self.model.stop_training)])
            total = self._syncbn_communicator.all_reduce_sum(stop, "syncbn/fit/stop")
            self.model.stop_training = bool(total.numpy()[0])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)  # type: ignore[misc]
        self._agree("epoch", epoch + 1)

    def on_train_end(self, logs: Any = None) -> None:
        super().on_train_end(logs)  # type: ignore[misc]
        self._begin(None)  # where no epoch was left
        changed: Any = self
        changed.__class__ = self._plain_class

    def _begin(self, epoch: int | None) -> None:
        """Raises where workers begin at different epochs, of which ``None`` is none."""
        if self._syncbn_begun:
            return
        self._syncbn_begun = True
        own = np.array([-1 if epoch is None else epoch], np.float64)
        epochs = all_gather(self._syncbn_communicator, own, "syncbn/fit/begin").ravel().astype(int)
        if (epochs != epochs[0]).any():
            raise ValueError(
                "All workers must begin at the same epoch. Received: "
                f"{', '.join('none' if one < 0 else str(one) for one in epochs)} on ranks 0 to "
                f"{len(epochs) - 1}. Use PreemptionCheckpoint, or give BackupAndRestore to all "
                "workers, each with a folder of its own."
            )

    def _agree(self, unit: str, number: int) -> None:
        weights = self._weights() if self._syncbn_same_weights else []
        # Of a step that was made before the optimizer's state was broadcast, it is not.
        rate = current_rate(self.model.optimizer) if unit == "epoch" else 0.0
        own = [self.model.stop_training, rate, *(_checksum(weight) for weight in weights)]
        rows = all_gather(
            self._syncbn_communicator, np.array(own, np.float64), f"syncbn/fit/{unit}"
        )
        self.model.stop_training = bool(rows[:, 0].any())
        if not np.array_equal(rows[:, 1], [rate] * len(rows), equal_nan=True):
            raise RuntimeError(
                "All workers must train with the same learning rate. Received, at the end of "
                f"{unit} {number}: {', '.join(map(str, rows[:, 1]))} on ranks 0 to "
                f"{len(rows) - 1}. Put AverageMetrics before callbacks that act on the logs, such "
                "as ReduceLROnPlateau."
            )
        differing = (rows[:, 2:] != rows[0, 2:]).any(axis=0)
        if differing.any():
            raise RuntimeError(self._difference(unit, number, weights, rows[:, 2:], differing))

    def _weights(self) -> list[Any]:
        optimizers = optimizers_of(self.model, self.model.optimizer)
        return shared_variables(self.model.trainable_variables, optimizers.values())

    def _difference(
        self, unit: str, number: int, weights: list[Any], rows: np.ndarray, differing: np.ndarray
    ) -> str:
        ranks = [rank for rank, row in enumerate(rows) if not np.array_equal(row, rows[0])]
        first = weights[int(np.argmax(differing))]
        optimizer = type(self.model.optimizer)
        return (
            "Training must leave all workers with the same weights. Received, at the end of "
            f"{unit} {number}: other ones on rank {', '.join(map(str, ranks))} than on rank 0, the "
            f"first of them {full_name(first)}, with the optimizer "
            f"{optimizer.__module__}.{optimizer.__qualname__}. Average the gradients over the "
            "workers: compile(syncbn.training.distribute(optimizer)), or in a train_step of your "
            "own a syncbn.training.DistributedGradientTape. Put AverageMetrics before callbacks "
            "that act on the logs, such as EarlyStopping. Where workers are meant to differ: "
            "BroadcastVariables(same_weights=False)."
        )


def _checksum(variable: Any) -> int:
    return zlib.crc32(variable.numpy().tobytes())
