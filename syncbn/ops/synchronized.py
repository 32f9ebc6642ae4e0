"""Batch normalization and centering over all replicas, each with an exact custom gradient.

Each makes one collective in the forward and one in the backward pass; every replica does, an empty
one too, since a missing replica would leave the others waiting.

Between the passes only the input, in its own dtype, and channel vectors are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn.ops.channels import broadcast, statistics_dtype, sum_to_channels, where
from syncbn.ops.kernels import (
    choose,
    gradient_alone,
    gradient_sums,
    input_gradient,
    normalize_alone,
    run,
    scale_and_offset,
)
from syncbn.ops.moments import Moments, Sums, checked_sums, count_elements, local_sums
from syncbn.ops.replicas import Replicas

Correction = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""Returns ``r`` and ``d`` of batch renormalization for a mean and a variance."""


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    replicas: Replicas,
    mask: tf.Tensor | None = None,
    correction: Correction | None = None,
    bessel: bool = False,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes ``x`` with the statistics of all replicas.

    ``y = gamma * (r * (x - mean) / sqrt(variance + epsilon) + d) + beta``, with ``r = 1`` and
    ``d = 0`` (Ioffe & Szegedy, 2015) or constants that `correction` gives (Ioffe, 2017).

    Args:
        x: The input; floating, rank 2 at least.
        gamma: ``(channels,)``.
        beta: ``(channels,)``.
        axes: The normalized axes, sorted and non-negative.
        epsilon: Added to the variance.
        replicas: The replicas to normalize with.
        mask: From `expand_mask`. It chooses what the statistics are taken of; the whole of ``x`` is
            normalized with them.
        correction: Of batch renormalization.
        bessel: Whether the variance that is returned is the unbiased one.

    Returns:
        ``y``, shape and dtype of ``x``, and the moments that the moving statistics take up, in
        float32 at least and cut off from the gradient.

        The gradient is that of the loss summed over the replicas with respect to this replica's
        ``x``, and this replica's own share in those of ``gamma`` and ``beta``.
    """
    dtype = statistics_dtype(x.dtype)
    kernels = choose(x, axes, masked=mask is not None)
    plain = mask is None and correction is None and _is_positive(epsilon, dtype)
    if replicas.alone and kernels.fused and plain:
        return _batch_normalize_alone(x, gamma, beta, axes, epsilon, replicas, bessel)

    @tf.custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Any]:
        merged, taken_up = replicas.merge(local_sums(x, axes, mask), bessel)
        mean, variance = tf.cast(merged.mean, dtype), tf.cast(merged.variance, dtype)
        inverse_deviation = _inverse_deviation(variance, epsilon)
        scale, offset = gamma * inverse_deviation, beta
        if correction is not None:
            r, d = map(tf.stop_gradient, correction(mean, variance))
            scale, offset = scale * r, beta + gamma * d
        y = scale_and_offset(x, mean, scale, offset, axes, kernels.fused)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # With x^ the normalized input, n the count over all replicas, and both sums over all
            # replicas:  dx = gamma r / sigma * (dy - sum(dy) / n - x^ * sum(dy * x^) / n).
            # The sums run over masked elements too, which also were normalized with the
            # statistics; the two corrections go to the elements that made the statistics.
            own_sums, scaled = gradient_sums(dy, x, mean, scale, axes, kernels, mask)
            sums = tf.stack(own_sums)
            dbeta, dgamma = tf.unstack(tf.cast(sums, dtype))
            dgamma *= inverse_deviation
            if correction is not None:
                dgamma = r * dgamma + d * dbeta
            total = replicas.all_reduce_sum(sums, "gradient")
            means = tf.cast(tf.math.divide_no_nan(total, merged.count), dtype)
            mean_dy, mean_dy_x = tf.unstack(means)
            # In this order: the cube of a small deviation's inverse is beyond float32.
            slope = scale * (inverse_deviation * (inverse_deviation * mean_dy_x))
            dx = input_gradient(
                dy, x, mean, scale, scaled, slope, scale * mean_dy, axes, kernels, mask
            )
            return dx, dgamma, dbeta

        return (y, *taken_up), gradient

    y, *taken_up = normalize(x, tf.cast(gamma, dtype), tf.cast(beta, dtype))
    return y, _cut_off(dtype, *taken_up)


def _batch_normalize_alone(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    axes: Sequence[int],
    epsilon: float,
    replicas: Replicas,
    bessel: bool,
) -> tuple[tf.Tensor, Moments]:
    """Is `batch_normalize` for one replica, which has nobody to wait for in the middle.

    There are kernels for the whole of each pass.
    """
    dtype = statistics_dtype(x.dtype)

    @tf.custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Any]:
        rough_y, rough_mean, rough_variance = normalize_alone(x, gamma, beta, epsilon, axes)
        sums, reliable = checked_sums(x, rough_mean, rough_variance, axes)
        merged, taken_up = replicas.merge(sums, bessel)
        mean, variance = tf.cast(merged.mean, dtype), tf.cast(merged.variance, dtype)

        def again() -> tf.Tensor:
            scale = gamma * _inverse_deviation(variance, epsilon)
            return scale_and_offset(x, mean, scale, beta, axes, fused=False)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            return gradient_alone(dy, x, gamma, mean, variance, epsilon, axes)

        return (tf.cond(reliable, lambda: rough_y, again), *taken_up), gradient

    y, *taken_up = normalize(x, tf.cast(gamma, dtype), tf.cast(beta, dtype))
    return y, _cut_off(dtype, *taken_up)


def center(
    x: tf.Tensor, *, axes: Sequence[int], replicas: Replicas, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, Moments]:
    """Subtracts from ``x`` its mean over all replicas.

    Args:
        x: The input; floating, rank 2 at least.
        axes: The axes that keep a mean of their own each, sorted and non-negative.
        replicas: The replicas to take the mean over.
        mask: From `expand_mask`. It chooses what the mean is taken of; it is subtracted everywhere.

    Returns:
        ``x - mean``, shape and dtype of ``x``, and the moments that the moving mean takes up,
        without a variance, cut off from the gradient. The gradient is that of the loss summed over
        the replicas.
    """
    dtype = statistics_dtype(x.dtype)

    def subtract(x: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(x, mean.dtype) - broadcast(mean, x, axes), x.dtype)

    @tf.custom_gradient
    def subtract_mean(x: tf.Tensor) -> tuple[Any, Any]:
        merged, taken_up = replicas.merge(_first_sums(x, axes, mask))
        y = run(subtract, (x, tf.cast(merged.mean, dtype)))

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
            wide_dy = tf.cast(dy, dtype)
            sum_dy = replicas.all_reduce_sum(sum_to_channels(wide_dy, axes), "gradient")
            mean_dy = tf.cast(tf.math.divide_no_nan(sum_dy, merged.count), dtype)
            shift = tf.broadcast_to(broadcast(mean_dy, x, axes), tf.shape(x))
            return tf.cast(wide_dy - where(mask, shift), x.dtype)

        return (y, taken_up.count, taken_up.mean), gradient

    y, *taken_up = subtract_mean(x)
    return y, _cut_off(dtype, *taken_up)


def _cut_off(
    dtype: tf.DType, count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor | None = None
) -> Moments:
    """Returns the moments in ``dtype``, without a gradient."""
    parts = count, tf.cast(mean, dtype), None if variance is None else tf.cast(variance, dtype)
    return Moments(*(None if part is None else tf.stop_gradient(part) for part in parts))


def _first_sums(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> Sums:
    def plain(x: tf.Tensor) -> tf.Tensor:
        return sum_to_channels(where(mask, tf.cast(x, statistics_dtype(x.dtype))), axes)

    return Sums(count_elements(x, axes, mask), run(plain, (x,)), None)


def _inverse_deviation(variance: tf.Tensor, epsilon: float) -> tf.Tensor:
    if _is_positive(epsilon, variance.dtype):
        return tf.math.rsqrt(variance + epsilon)
    # Zero where there is nothing to divide by: no NaN comes of it.
    return tf.math.divide_no_nan(tf.ones([], variance.dtype), tf.sqrt(variance + epsilon))


def _is_positive(epsilon: float, dtype: tf.DType) -> bool:
    return epsilon >= np.finfo(dtype.as_numpy_dtype).tiny
