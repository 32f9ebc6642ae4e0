"""The truth: NumPy in float64 on the concatenated batch, with nothing of the package in it."""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """What a layer must return for the whole batch; parameter gradients are summed over it."""

    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    normalized: np.ndarray
    """What gamma is multiplied with."""
    dx_terms: np.ndarray
    """The first of the terms that add up to dx."""


def reduced_axes(x, axis):
    """Returns the axes that statistics are taken over, all but ``axis``."""
    kept = {a % x.ndim for a in (axis if isinstance(axis, (list, tuple)) else [axis])}
    return tuple(a for a in range(x.ndim) if a not in kept)


def _weights(x, mask):
    if mask is None:
        return np.ones(x.shape)
    return np.broadcast_to(np.asarray(mask, "float64")[..., None], x.shape)


def _moments(x, weights, reduced):
    count = weights.sum(reduced, keepdims=True)
    safe = np.maximum(count, 1)
    seen = np.where(weights > 0, x, 0)
    mean = seen.sum(reduced, keepdims=True) / safe
    variance = (np.where(weights > 0, x - mean, 0) ** 2).sum(reduced, keepdims=True) / safe
    return count, mean, variance


def batch_normalization(
    x, dy, gamma, beta, *, axis=-1, epsilon=1e-3, mask=None, correction=lambda *moments: (1.0, 0.0)
):
    """Normalizes ``x``; ``dy`` is the loss's gradient with respect to the outputs.

    ``correction`` gives r and d of batch renormalization for mean and variance.
    """
    x, dy = np.asarray(x, "float64"), np.asarray(dy, "float64")
    reduced, weights = reduced_axes(x, axis), _weights(x, mask)
    count, mean, variance = _moments(x, weights, reduced)
    shape = mean.shape
    r, d = correction(mean.reshape(-1), variance.reshape(-1))
    gamma, beta, r, d = (
        np.broadcast_to(np.reshape(v, -1), mean.size).reshape(shape) for v in (gamma, beta, r, d)
    )
    normalized = (x - mean) / np.sqrt(variance + epsilon)
    sum_dy = dy.sum(reduced, keepdims=True)
    sum_dy_x = contribution(dy, normalized).sum(reduced, keepdims=True)
    share = (sum_dy + np.where(weights > 0, normalized, 0) * sum_dy_x) * weights
    scale = gamma * r / np.sqrt(variance + epsilon)
    dgamma, dbeta = r * sum_dy_x + d * sum_dy, sum_dy
    flat = [v.reshape(-1) for v in (dgamma, dbeta, count, mean, variance)]
    corrected = normalized * r + d
    dx = scale * (dy - share / np.maximum(count, 1))
    return Result(gamma * corrected + beta, dx, *flat, corrected, scale * dy)


def contribution(dy, normalized):
    """What each element gives to dgamma: nothing where it does not matter, whatever it holds."""
    return dy * np.where(dy == 0, 0, normalized)


def centering(x, dy, *, axis=-1, mask=None):
    """Centers ``x``; the fields of the result that centering lacks are empty."""
    x, dy = np.asarray(x, "float64"), np.asarray(dy, "float64")
    reduced, weights = reduced_axes(x, axis), _weights(x, mask)
    count, mean, _ = _moments(x, weights, reduced)
    share = np.where(weights > 0, dy.sum(reduced, keepdims=True), 0) / np.maximum(count, 1)
    none = np.zeros(0)
    y = x - mean
    count, mean = count.reshape(-1), mean.reshape(-1)
    return Result(y, dy - share, none, none, count, mean, none, none, dy)


def measured_errors(batches, mean, variance, epsilon):
    """The errors of the statistics of these batches: mean, variance, normalized elements."""
    off = (batches.mean(1) - mean) / np.sqrt(variance + epsilon)
    ratio = (batches.var(1) + epsilon) / (variance + epsilon)
    own = (batches - batches.mean(1, keepdims=True)) / np.sqrt(
        batches.var(1, keepdims=True) + epsilon
    )
    true = (batches - mean) / np.sqrt(variance + epsilon)
    return [np.sqrt(np.mean(part**2)) for part in (off, ratio - 1, own - true)]
