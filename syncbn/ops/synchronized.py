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
from syncbn.ops.kernels import fused_is_faster, gradient_terms, scale_and_offset
from syncbn.ops.moments import Moments, Sums, count_elements, local_sums
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
    fused = fused_is_faster(x, axes)

    @tf.custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Any]:
        merged, taken_up = replicas.merge(local_sums(x, axes, mask), bessel)
        mean, variance = tf.cast(merged.mean, dtype), tf.cast(merged.variance, dtype)
        inverse_deviation = _inverse_deviation(variance, epsilon)
        scale, offset = gamma * inverse_deviation, beta
        if correction is not None:
            r, d = map(tf.stop_gradient, correction(mean, variance))
            scale, offset = scale * r, beta + gamma * d
        y = scale_and_offset(tf.cast(x, dtype), mean, scale, offset, axes, fused)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # With x^ the normalized input, n the count over all replicas, and both sums over all
            # replicas:  dx = gamma r / sigma * (dy - sum(dy) / n - x^ * sum(dy * x^) / n).
            # The sums run over masked elements too, which also were normalized with the
            # statistics; the two corrections go to the elements that made the statistics.
            wide_x = tf.cast(x, dtype)
            terms = gradient_terms(tf.cast(dy, dtype), wide_x, mean, scale, axes, fused, mask)
            sums = tf.stack([terms.sum, terms.centered_sum])
            dbeta, dgamma = tf.unstack(tf.cast(sums, dtype))
            dgamma *= inverse_deviation
            if correction is not None:
                dgamma = r * dgamma + d * dbeta
            total = replicas.all_reduce_sum(sums, "gradient")
            mean_dy, mean_dy_x = tf.unstack(
                tf.cast(tf.math.divide_no_nan(total, merged.count), dtype)
            )
            shift = scale_and_offset(
                where(mask, wide_x),
                mean,
                scale * tf.square(inverse_deviation) * mean_dy_x,
                scale * mean_dy,
                axes,
                fused,
            )
            dx = terms.scaled - where(mask, shift)
            return tf.cast(dx, x.dtype), dgamma, dbeta

        return (tf.cast(y, x.dtype), *taken_up), gradient

    y, count, *moments = normalize(x, tf.cast(gamma, dtype), tf.cast(beta, dtype))
    moments = (tf.cast(moment, dtype) for moment in moments)
    return y, Moments(*map(tf.stop_gradient, (count, *moments)))


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

    @tf.custom_gradient
    def subtract_mean(x: tf.Tensor) -> tuple[Any, Any]:
        merged, taken_up = replicas.merge(_first_sums(tf.cast(x, dtype), axes, mask))
        y = tf.cast(x, dtype) - broadcast(tf.cast(merged.mean, dtype), x, axes)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
            wide_dy = tf.cast(dy, dtype)
            sum_dy = replicas.all_reduce_sum(sum_to_channels(wide_dy, axes), "gradient")
            mean_dy = tf.cast(tf.math.divide_no_nan(sum_dy, merged.count), dtype)
            shift = tf.broadcast_to(broadcast(mean_dy, x, axes), tf.shape(x))
            return tf.cast(wide_dy - where(mask, shift), x.dtype)

        return (tf.cast(y, x.dtype), taken_up.count, taken_up.mean), gradient

    y, count, mean = subtract_mean(x)
    return y, Moments(tf.stop_gradient(count), tf.stop_gradient(tf.cast(mean, dtype)), None)


def _first_sums(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> Sums:
    count = count_elements(x, axes, mask)
    return Sums(count, sum_to_channels(where(mask, x), axes), None)


def _inverse_deviation(variance: tf.Tensor, epsilon: float) -> tf.Tensor:
    if epsilon > np.finfo(variance.dtype.as_numpy_dtype).tiny:
        return tf.math.rsqrt(variance + epsilon)
    # Zero where there is nothing to divide by: no NaN comes of it.
    return tf.math.divide_no_nan(tf.ones([], variance.dtype), tf.sqrt(variance + epsilon))
