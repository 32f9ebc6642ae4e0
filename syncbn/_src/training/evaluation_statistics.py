"""The moving statistics that a model is evaluated with: averaged, or measured anew, in `fit`."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from syncbn._src.arguments import at_least_one
from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import all_gather, sum_arrays
from syncbn._src.models.dataset_batches import once_only
from syncbn._src.models.recalibration import Recalibration
from syncbn._src.models.statistics import (
    MovingStatistics,
    moving_statistics,
    normalizations,
    set_moving_statistics,
)
from syncbn._src.models.training_job import job_of
from syncbn._src.training.callbacks import WorkerCallback
from syncbn._src.training.kept_local import local_in


class AverageStatistics(WorkerCallback):
    """Averages moving statistics over all replicas, once an epoch, before they are used.

    It is for models whose batch normalization stays plain: each replica has the moving statistics
    of its own batches, so each one evaluates another model, and a file gets that of one of them.
    Here the moving mean and variance of each normalization become the means over all replicas, as
    in the ``--dist-bn reduce`` of timm. That is what one moving average over the batches of all of
    them would be; as that does, it leaves out how far the batches' means lie apart.

    It averages before validation and at the end of each epoch, in one message of twice as many
    numbers as there are channels. Put it before callbacks that save. Synchronized layers have equal
    statistics already, and keep them; so do layers that the optimizer keeps local (see
    `distribute`). It works under every engine.

    Args:
        communicator: As for `syncbn.SyncBatchNormalization`.

    Raises:
        ValueError: an average is not finite.

    Example:
        >>> callbacks = [syncbn.training.AverageStatistics()]
        >>> history = model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
    """

    def on_test_begin(self, logs: Any = None) -> None:
        self._average()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._average()

    def _average(self) -> None:
        job = job_of(self.model, self._communicator)
        workers, layers = job.workers(), normalizations(self.model)
        means = [layer.moving_mean for layer in layers.values()]
        owns = local_in(self.model).among(means)
        shared = [name for name, own in zip(layers, owns, strict=True) if not own]
        weights = [
            (name, weight)
            for name in shared
            for weight in ("moving_mean", "moving_variance")
            if hasattr(layers[name], weight)
        ]
        own: list[np.ndarray] = []
        for name, weight in weights:
            copies = [copy.numpy() for copy in job.copies(getattr(layers[name], weight))]
            own.append(np.stack(copies).astype(np.float64).mean(axis=0))
        totals = sum_arrays(workers, own, "syncbn/average_statistics")
        averages: dict[str, list[np.ndarray]] = {name: [] for name in shared}
        for (name, _), total in zip(weights, totals, strict=True):
            averages[name].append(total / workers.size)
        set_moving_statistics(
            self.model, {name: MovingStatistics(*values) for name, values in averages.items()}
        )


class Recalibrate(WorkerCallback):
    """Recalibrates the moving statistics in `fit` before they are used; see `syncbn.recalibrate`.

    At the end of training, the statistics become those of the weights that training ends with,
    averaged ones included: with ``use_ema``, Keras puts the averages of an optimizer in place
    then. With ``every=k``, they are also recalibrated in each k-th epoch, before its validation, or
    at its end where there is none. In `Model.evaluate` outside of `fit`, they always are.

    Where a callback before this one evaluates other weights than those that are trained, as
    `tf.keras.callbacks.SwapEMAWeights` does, they are recalibrated for these, and come back with
    the others::

        callbacks = [SwapEMAWeights(swap_on_epoch=True), Recalibrate(images, every=1), *others]

    Callbacks that change the weights stand before this one, and those that save behind it. The
    other order is an error as soon as it shows.

    It works under every engine. All workers have it, each with batches of its own, and go over
    them together. Weights that have not changed since the last time take no pass over the data.

    Args:
        dataset: Batches as for `syncbn.recalibrate`, which can be gone through again each time.
        every: The number of epochs from one recalibration to the next, or ``None`` for one at the
            end of training only.
        exact: As for `syncbn.recalibrate`.
        steps: Likewise.
        verbose: Likewise.
        communicator: Likewise.

    Raises:
        ValueError: ``every`` is not positive, or ``dataset`` is an iterator.
        RuntimeError: in training: weights were changed behind this callback, before they were
            evaluated or trained.

        And whatever `syncbn.recalibrate` raises.

    Example:
        >>> callbacks = [syncbn.training.Recalibrate([x], every=1)]
        >>> history = model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
        >>> mean, variance, _ = syncbn.moving_statistics(model)["normalization"]
        >>> np.allclose(mean, x.mean(0), atol=1e-6)
        True
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        every: int | None = None,
        *,
        exact: bool = False,
        steps: int | None = None,
        verbose: int | str = 0,
        communicator: str | Communicator = "auto",
    ) -> None:
        super().__init__(communicator)
        if every is not None:
            every = at_least_one("every", every, ", or None")
        if once_only(dataset):
            raise ValueError(
                "Recalibrate goes through `dataset` several times. Received: an iterator, which "
                "can be gone through once. Give a tf.data.Dataset, or a list of batches."
            )
        self.dataset, self.every = dataset, every
        self._options: dict[str, Any] = {"exact": exact, "steps": steps, "verbose": verbose}
        self._in_fit = self._due = False
        self._recalibration: Recalibration | None = None
        self._measured: tuple[int, dict[str, MovingStatistics]] | None = None
        """The checksum of the weights that were recalibrated last, and their statistics."""
        self._replaced: tuple[int, dict[str, MovingStatistics]] | None = None
        """That of the weights that are evaluated, and the statistics from before."""
        self._expected: int | None = None
        """What it has to be at the next batch."""
        self._trained: int | None = None
        """That of the weights that came back after they had been replaced in validation."""

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        self._recalibration = self._measured = None
        self._in_fit = False  # also after a `fit` that was interrupted

    def on_train_begin(self, logs: Any = None) -> None:
        self._in_fit, self._due, self._replaced, self._expected = True, False, None, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._due = self.every is not None and (epoch + 1) % self.every == 0
        # Where a callback before this one puts back what was trained, one behind it must not.
        self._expected, self._trained = self._put_back(), None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._require_no_change("on_epoch_begin")

    def on_test_begin(self, logs: Any = None) -> None:
        if self._due or not self._in_fit:
            self._expected = self._recalibrate()

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._require_no_change("on_test_begin")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Is there so that Keras calls callbacks one after the other, in this thread."""

    def on_test_end(self, logs: Any = None) -> None:
        self._trained = self._put_back()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # Not what goes on to be trained, where other weights have been evaluated.
        if self._due and (self._trained is None or self._trained != self._checksum()):
            self._recalibrate()

    def on_train_end(self, logs: Any = None) -> None:
        self._recalibrate()
        self._in_fit, self._replaced = False, None

    def _recalibrate(self) -> int:
        """Gives the model the statistics of its weights, and returns the weights' checksum."""
        checksum, before = self._checksum(), moving_statistics(self.model)
        workers = job_of(self.model, self._communicator).workers()
        known = self._measured is not None and self._measured[0] == checksum
        # What is local to a worker may change there only, and a pass takes all of them.
        if self._measured and all_gather(workers, np.array([known]), "syncbn/recalibrated").all():
            set_moving_statistics(self.model, self._measured[1])
        else:
            if self._recalibration is None:
                self._recalibration = Recalibration(self.model, self._communicator)
            self._recalibration.run(self.dataset, **self._options)
            self._measured = checksum, moving_statistics(self.model)
        self._replaced = checksum, before
        return checksum

    def _put_back(self) -> int | None:
        """Puts the statistics back if other weights are, and returns their checksum then."""
        if self._replaced is None:
            return None
        (evaluated, before), self._replaced = self._replaced, None
        checksum = self._checksum()
        if checksum == evaluated:
            return None
        set_moving_statistics(self.model, before)
        return checksum

    def _require_no_change(self, where: str) -> None:
        if self._expected is None:
            return
        expected, self._expected = self._expected, None
        if self._checksum() != expected:
            raise RuntimeError(
                "Recalibrate must stand behind callbacks that change the weights, such as "
                f"SwapEMAWeights. Received: weights that changed behind it, in {where}. Put it "
                "behind them: callbacks=[SwapEMAWeights(), Recalibrate(dataset, every=1)]."
            )

    def _checksum(self) -> int:
        checksum = 0
        for weight in self.model.trainable_variables:
            checksum = zlib.crc32(weight.numpy().tobytes(), checksum)
        return checksum
