"""How far the statistics of a few replicas are from those of the data, by the design effect.

A batch normalization takes the mean m and the variance v of the elements that its replicas have. If
the elements were independent, their number would say how far m and v are from the mean μ and the
variance s² of the data. They are not: the pixels of an image resemble each other. So what is
independent is taken to be the batch of a replica, and the errors come from how the means and
variances of these batches differ (the clusters of survey sampling; Kish, "Survey Sampling", 1965,
chapter 5).

With a = m - μ and q = v + a² of a replica's batch, and A = E[a²], the statistics of g replicas are
the means of g independent a and q:

    mean:      E[(m - μ)²] = A / g
    variance:  v = mean(q) - mean(a)²
               E[v] = s² - A / g
               Var[v] = Var[q] / g - 2 Cov[q, a²] / g² + (E[a⁴] + (2 g - 3) A²) / g³

These hold exactly, for any distribution. What the network sees is (x - m) / sqrt(v) in the place of
(x - μ) / s. Over the elements of a batch their difference has the mean square

    (m - μ)² / s² + (sqrt(v) / s - 1)²

For its expectation v is taken to be distributed as a multiple of χ², with the degrees of freedom
2 E[v]² / Var[v] (Satterthwaite, "An approximate distribution of estimates of variance components",
1946).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf


class ReplicaMoments(NamedTuple):
    """What the batches of replicas have, ``(batches, channels)`` each, float64."""

    elements: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


class BatchDistribution(NamedTuple):
    """How the batches of replicas are distributed, one number for each channel, float64."""

    elements: np.ndarray
    """The mean number of a batch."""
    variance: np.ndarray
    """s², of all elements."""
    mean_square: np.ndarray
    """A = E[a²]."""
    fourth_power: np.ndarray
    """E[a⁴]."""
    second_variance: np.ndarray
    """Var[q]."""
    covariance: np.ndarray
    """Cov[q, a²]."""

    @property
    def independent(self) -> float:
        """The independent elements that are worth as much as a batch, for the mean."""
        varies = self.variance > 0  # of a channel that does not, nothing is known
        error = np.mean(self.mean_square[varies] / self.variance[varies]) if varies.any() else 0.0
        return 1 / float(error) if error else float(np.mean(self.elements))


class StatisticsError(NamedTuple):
    """How far the statistics of a group of replicas are from those of the data.

    Each is a root mean square, over the channels too.
    """

    replicas: int
    mean: float
    """Of the mean, in standard deviations."""
    variance: float | None
    """Of the variance, as a part of it; ``None`` where a layer has none."""
    output: float
    """Of a normalized element, whose own standard deviation is one."""


def batch_distribution(
    batches: ReplicaMoments, add_up: Callable[[np.ndarray], np.ndarray] = lambda own: own
) -> BatchDistribution:
    """Estimates the distribution from batches.

    Args:
        batches: Those of this worker. Batches without elements have no part in it.
        add_up: Adds up arrays over all workers.
    """
    count, mean, variance = batches
    present = count > 0
    number, elements, total = add_up(
        np.stack([np.sum(part, 0) for part in (present, count, count * mean)])
    )
    elements_each = _divide(elements, number)
    # Batches weigh as much as they have elements.
    weight = _divide(count, elements_each)
    off = mean - _divide(total, elements)
    a, q = weight * off, weight * (variance + off**2)
    sums = add_up(np.stack([np.sum(part, 0) for part in (q, q**2, q * a**2, a**2, a**4)]))
    means = _divide(sums, number)
    second, second_square, product, square, fourth = means
    # The mean of the data is that of these batches, from which they are less far than from μ.
    unbiased = _divide(number, number - 1)
    return BatchDistribution(
        elements_each,
        second,
        square * unbiased,
        fourth,
        np.maximum(second_square - second**2, 0) * unbiased,
        (product - second * square) * unbiased,
    )


def statistics_error(
    batch: BatchDistribution, replicas: int, epsilon: float | None
) -> StatisticsError:
    """Returns how far the statistics of so many replicas are from those of the data.

    Args:
        batch: How the batches of replicas are distributed.
        replicas: Their number, g.
        epsilon: What the normalization adds to the variance, here too; ``None`` where it removes
            the mean only.
    """
    g, square = replicas, batch.mean_square
    of_mean = square / g
    if epsilon is None:
        error = _root_mean(of_mean, batch.variance)
        return StatisticsError(replicas, error, None, error)
    spread = batch.second_variance / g - 2 * batch.covariance / g**2
    spread += (batch.fourth_power + (2 * g - 3) * square**2) / g**3
    spread = np.maximum(spread, 0)
    expected = np.maximum(batch.variance - of_mean, 0) + epsilon
    scale = batch.variance + epsilon
    # E[sqrt(v)] of a multiple of χ² with these degrees of freedom; sqrt(E[v]) for infinitely many.
    half = np.minimum(_divide(expected**2, spread, otherwise=np.inf), 1e6)
    root = np.sqrt(expected / half) * np.exp(_log_gamma(half + 0.5) - _log_gamma(half))
    of_deviation = np.maximum(expected - 2 * np.sqrt(scale) * root + scale, 0)
    return StatisticsError(
        replicas,
        _root_mean(of_mean, scale),
        _root_mean(spread + (expected - scale) ** 2, scale**2),
        _root_mean(of_mean + of_deviation, scale),
    )


def _root_mean(square: np.ndarray, scale: np.ndarray) -> float:
    """Returns the root of the mean ratio; a channel that is always the same has no error."""
    return float(np.sqrt(np.mean(_divide(square, scale))))


def _log_gamma(x: np.ndarray) -> np.ndarray:
    return tf.math.lgamma(x).numpy()


def _divide(a: np.ndarray, b: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, otherwise), where=b > 0)
