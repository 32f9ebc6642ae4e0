"""A callback that watches the statistics of the normalizations in training."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import sum_arrays
from syncbn._src.keras_compat.keras_api import steps_made
from syncbn._src.keras_compat.layer_names import collective_scope
from syncbn._src.keras_compat.resumed_fit import is_skipped
from syncbn._src.models.replica_spread import JointStatistics, ReplicaObserver
from syncbn._src.models.statistics import normalizations
from syncbn._src.training.callbacks import WorkerCallback
from syncbn._src.watchdog.flight_recorder import RECORDER

_DEAD = 0.01
"""The share of epsilon up to which a channel's variance is that of a dead one."""

# What `tf.summary.scalar` writes, which needs TensorBoard to be installed where training runs.
_SCALAR = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "scalars"}, data_class=1)


class LayerFigures(NamedTuple):
    """The figures of a normalization; see `StatisticsMonitor`. ``None`` where it has none."""

    mean_drift: float
    variance_drift: float | None
    replica_spread: float | None
    dead_channels: int
    waiting_ms: float | None = None


class StatisticsMonitor(WorkerCallback):
    """Watches the statistics of a model's normalizations in `fit`, for TensorBoard and the logs.

    After each epoch the model runs on one batch of each replica as at inference; nothing in it
    changes. For each normalization, with what it sees there and its moving statistics:

    - ``mean_drift``: √ mean over channels of (m - μ)² / (σ² + ε), with the mean m of the batches of
      all replicas, and the moving mean μ and variance σ². At inference the output, before gamma and
      beta, has this mean where it should have 0.
    - ``variance_drift``: √ mean over channels of ln² ((v + ε) / (σ² + ε)), with the variance v of
      the batches of all replicas. At 0.1, what should have variance 1 has some 10 % more or less.
    - ``replica_spread``: √ mean over channels of b / (v + ε), with the variance between the
      replicas, b = Σ n_r (m_r - m)² / Σ n_r, of their counts n_r and means m_r. It is how far, in
      standard deviations, the mean of a replica lies from that of all R. Its square is the
      correlation ratio η² of Fisher (1925): the share of the variance between replicas. With one
      replica there is none. Of N samples drawn at random on each, and one position, it is about
      √((1 - 1/R) / N). It is of this batch: the error of a layer that is not synchronized, in a
      training step with a smaller one, is larger, and `syncbn.advise` estimates it.
    - ``dead_channels``: the number of channels with v ≤ ε / 100. What they give has a standard
      deviation of a tenth at most, before gamma. (v = 0 where a layer has no ε.)
    - ``waiting_ms``: the time in the layer's collectives, in milliseconds for each step, the mean
      over the workers. Who comes last does not wait. One process does not wait at all, and has no
      such figure. On a GPU it includes what the GPU had still to compute when the step issued them,
      except over MPI. Layers whose collectives have the same name (in Keras 2 that is the layer's,
      without those around it) get equal shares of their time. A call that fails does not count.

    `SyncCentering` has no moving variance: its drift is in units of v. Where layers are not
    synchronized, moving statistics are the mean of those of the workers.

    Rank 0 writes. All workers have the callback, and get the same logs. It takes a forward pass for
    each replica and two small messages, after an epoch and never in a step.

    Args:
        batch: A batch of this worker's own data, for all of its replicas, as for
            `syncbn.recalibrate`. It stays the same, so that figures can be compared; some hundred
            samples tell more than a few.
        log_dir: Where to write for TensorBoard, as the run ``statistics`` beside those of Keras'
            own callback; ``None`` for nowhere. The tags are such as ``mean_drift/block/norm``.
        update_freq: ``"epoch"``, or a number of batches after which to observe, also within an
            epoch. The steps of the summaries are epochs, or batches, which count on from the
            optimizer's ``iterations`` at the beginning of `fit`.
        logs: What the logs of each epoch get, and so `History`, `CSVLogger` and `EarlyStopping`:
            ``"largest"``, for each figure the largest of all layers (of dead channels and waiting,
            the sum); ``"layers"``, the figures of each layer too, such as
            ``mean_drift/block/norm``; ``None``, nothing.
        communicator: As for `syncbn.SyncBatchNormalization`.

    Attributes:
        latest: The latest figures, by the layers' names.

    Raises:
        ValueError: an unknown ``update_freq`` or ``logs``.
        TypeError: ``batch`` is a dataset.
        NotImplementedError: in training: the model calls a normalization in a loop or branch.
        RuntimeError: in training: another worker failed.

    Example:
        >>> monitor = syncbn.training.StatisticsMonitor(x)
        >>> history = model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor])
        >>> monitor.latest["normalization"].dead_channels
        0
    """

    def __init__(
        self,
        batch: Any,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        update_freq: int | str = "epoch",
        logs: str | None = "largest",
        communicator: str | Communicator = "auto",
    ) -> None:
        super().__init__(communicator)
        if update_freq != "epoch":
            update_freq = at_least_one("update_freq", update_freq, ', or "epoch"')
        if logs not in ("largest", "layers", None):
            raise ValueError(f'`logs` must be "largest", "layers" or None. Received: {logs!r}.')
        if isinstance(batch, tf.data.Dataset):
            raise TypeError(
                "`batch` must be a batch. Received: a dataset. Give next(iter(dataset))."
            )
        self.batch, self.log_dir, self.update_freq, self.logs = batch, log_dir, update_freq, logs
        self.latest: dict[str, LayerFigures] = {}
        self._observer: ReplicaObserver | None = None
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._observer, self._writer = None, None
        self._steps = self._observed = self._steps_of_epoch = 0
        self._waited = RECORDER.seconds()
        self._first_epoch = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._steps_of_epoch = 0
        if self._first_epoch:  # not before, since other callbacks restore it when training begins
            self._first_epoch = False
            iterations = getattr(getattr(self.model, "optimizer", None), "iterations", 0)
            # Of a strategy's variable, too.
            self._steps = self._observed = int(tf.convert_to_tensor(iterations))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, self._steps_of_epoch = self._steps_of_epoch, steps_made(self, batch)
        if is_skipped(self.model, batch):
            return
        self._steps += self._steps_of_epoch - before  # several, with steps_per_execution
        if self.update_freq != "epoch":
            every = int(self.update_freq)
            if self._steps // every > self._observed // every:
                self._observe(self._steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self.update_freq == "epoch":
            self._observe(epoch)
        if logs is not None:
            logs.update(self._of_epoch())

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()

    def _observe(self, step: int) -> None:
        if self._observer is None:
            self._observer = ReplicaObserver(self.model, self._communicator)
        observer, layers = self._observer, normalizations(self.model)
        joint = observer(self.batch)
        waiting = self._waiting({name: layers[name] for name in joint}, observer.workers)
        self.latest = {}
        for name, one in joint.items():
            epsilon = getattr(layers[name], "epsilon", 0.0)
            figures = _figures(one, epsilon, observer.replicas)
            self.latest[name] = figures._replace(waiting_ms=waiting.get(name))
        self._observed = self._steps
        if self.log_dir is not None and observer.workers.rank == 0:
            self._write(os.path.join(self.log_dir, "statistics"), step)
        # Without what this took itself.
        self._waited = RECORDER.seconds()

    def _waiting(self, layers: dict[str, Any], workers: Communicator) -> dict[str, float]:
        """Returns the milliseconds of a step in each layer's collectives, where they are known."""
        before, now = self._waited, RECORDER.seconds()
        seconds = {name: time - before.get(name, 0.0) for name, time in now.items()}
        own = _shared_out(seconds, [collective_scope(layer) for layer in layers.values()])
        (total,) = sum_arrays(workers, [np.array(own)], "syncbn/waiting")
        means = 1e3 * total / workers.size / max(self._steps - self._observed, 1)
        return {name: float(mean) for name, mean in zip(layers, means, strict=True) if mean}

    def _write(self, folder: str, step: int) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(folder)
        with self._writer.as_default():
            for tag, value in self._by_tag().items():
                tf.summary.write(tag, np.float32(value), step=step, metadata=_SCALAR)
        self._writer.flush()

    def _by_tag(self) -> dict[str, float]:
        return {
            f"{figure}/{name}": value
            for figure in LayerFigures._fields
            for name, one in self.latest.items()
            if (value := getattr(one, figure)) is not None
        }

    def _of_epoch(self) -> dict[str, float]:
        if self.logs is None or not self.latest:
            return {}
        columns = {
            figure: [value for value in column if value is not None]
            for figure, column in zip(
                LayerFigures._fields, zip(*self.latest.values(), strict=True), strict=True
            )
        }
        largest = {
            figure: float((np.sum if figure in ("dead_channels", "waiting_ms") else np.max)(column))
            for figure, column in columns.items()
            if column
        }
        return largest | (self._by_tag() if self.logs == "layers" else {})


def _shared_out(seconds: dict[str, float], scopes: list[str]) -> list[float]:
    """Returns the time of each scope's collectives, which those that are the same share equally."""
    of_scope: defaultdict[str, float] = defaultdict(float)
    for name, time in seconds.items():
        # Names may have something before the scope, and one scope may begin with another one.
        found = [scope for scope in scopes if f"{scope}/" in name]
        if found:
            of_scope[max(found, key=len)] += time
    layers = Counter(scopes)
    return [of_scope[scope] / layers[scope] for scope in scopes]


def _figures(joint: JointStatistics, epsilon: float, replicas: int) -> LayerFigures:
    """Returns the figures of a layer; the formulas are those of `StatisticsMonitor`."""
    variance = joint.within + joint.between
    moving, variance_drift = variance, None
    if joint.moving_variance is not None:
        moving = joint.moving_variance
        scales = np.array([variance, moving]) + epsilon
        ratios = np.diff(np.log(scales[:, scales.all(axis=0)]), axis=0)
        variance_drift = _root_mean(ratios**2)
    return LayerFigures(
        _in_deviations((joint.mean - joint.moving_mean) ** 2, moving + epsilon),
        variance_drift,
        _in_deviations(joint.between, variance + epsilon) if replicas > 1 else None,
        int(np.sum(variance <= _DEAD * epsilon)),
    )


def _in_deviations(squares: np.ndarray, variance: np.ndarray) -> float:
    """Returns the root mean square over the channels, in standard deviations."""
    varies = variance != 0  # or there is no epsilon
    return _root_mean(squares[varies] / variance[varies])


def _root_mean(squares: np.ndarray) -> float:
    return float(np.sqrt(np.mean(squares))) if squares.size else 0.0
