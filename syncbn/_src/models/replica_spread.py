"""What the normalizations of a model see on each replica of a job, and on all of them together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import sum_of_all
from syncbn._src.models.activation_statistics import Observer
from syncbn._src.models.statistics import (
    channels_of,
    moving_statistics,
    normalizations,
    require_same_normalizations,
)
from syncbn._src.models.training_job import TrainingJob, job_of

_PARTS = 6
"""How many vectors a worker contributes for each normalization."""


class JointStatistics(NamedTuple):
    """What a normalization sees on all replicas, and its moving statistics. All ``(channels,)``.

    With the counts n_r, means m_r and biased variances v_r of the replicas' batches, and
    N = Σ n_r, the variance over all replicas is ``within + between`` (law of total variance).
    """

    count: Any  # (also a method of tuples, of another type)
    """N"""
    mean: np.ndarray
    """Σ n_r m_r / N"""
    within: np.ndarray
    """Σ n_r v_r / N"""
    between: np.ndarray
    """Σ n_r (m_r - mean)² / N"""
    moving_mean: np.ndarray
    """The mean over the workers, which have the same where layers are synchronized."""
    moving_variance: np.ndarray | None
    """Likewise; ``None`` where the layer has none."""


class ReplicaObserver:
    """Observes what the normalizations of a model see at inference, on all replicas of its job.

    Nothing in the model changes. At inference, each sample is normalized independently of the
    others, so what replicas see differs as their data differ, and by nothing else.

    Args:
        model: A built model of `tf.keras`.
        communicator: As for `syncbn.recalibrate`.
    """

    def __init__(self, model: Any, communicator: str | Communicator) -> None:
        self._model = model
        self._job: TrainingJob = job_of(model, communicator)
        self.replicas = self._job.size
        """The number of replicas in the job."""
        self.workers = self._job.workers()
        """The communicator of its processes."""
        layers = normalizations(model)
        require_same_normalizations(self.workers, layers)
        self._observer = Observer(model, layers, all_fixed=True)
        self._channels = {name: channels_of(layer) for name, layer in layers.items()}

    def __call__(self, batch: Any) -> dict[str, JointStatistics]:
        """Returns the statistics of each normalization that sees anything, by its name.

        All workers make the call, each with the batch of its own replicas, which share it out
        evenly. It takes a forward pass for each replica in this process, and one message.

        Args:
            batch: As for `syncbn.recalibrate`.

        Raises:
            NotImplementedError: the model calls a normalization in a loop or branch of its graph.
            RuntimeError: another worker failed.
        """
        statistics = moving_statistics(self._model)  # under a strategy, a call of all workers
        sizes = [_PARTS * channels for channels in self._channels.values()]

        def own() -> np.ndarray:
            self._observer.start(statistics)
            sums = {name: np.zeros((4, size)) for name, size in self._channels.items()}
            for part in _parts(batch, len(self._job.ranks)):
                for name, seen in self._observer(part, self._observer.nothing()).items():
                    count, mean, variance = seen.numpy()
                    sums[name] += count * [np.ones_like(mean), mean, mean**2, variance]
            vectors = []
            for name, (mean, variance, _) in statistics.items():
                variance = np.zeros_like(mean) if variance is None else variance
                vectors += [sums[name], mean, variance]
            return np.concatenate([np.ravel(vector) for vector in vectors])

        total = sum_of_all(self.workers, own, sum(sizes), "StatisticsMonitor")
        parts = zip(statistics.items(), np.split(total, np.cumsum(sizes)[:-1]), strict=True)
        joint = {
            name: self._joint(part.reshape(_PARTS, -1), one.variance is not None)
            for (name, one), part in parts
        }
        return {name: one for name, one in joint.items() if one.count.any()}

    def _joint(self, sums: np.ndarray, has_variance: bool) -> JointStatistics:
        count, *of_replicas, moving_mean, moving_variance = sums
        mean, squares, within = (one / np.where(count, count, 1) for one in of_replicas)
        between = np.maximum(squares - mean**2, 0)  # it may round to less
        return JointStatistics(
            count,
            mean,
            within,
            between,
            moving_mean / self.workers.size,
            moving_variance / self.workers.size if has_variance else None,
        )


def _parts(batch: Any, replicas: int) -> Any:
    """Returns even parts of a batch, the last of which may be smaller, or missing."""
    if replicas == 1:
        return [batch]
    batch = tuple(batch) if isinstance(batch, list) else batch
    samples = tf.data.Dataset.from_tensor_slices(batch)
    return samples.batch(-(-int(samples.cardinality()) // replicas))
