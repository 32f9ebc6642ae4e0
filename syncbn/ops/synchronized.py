"""Batch normalization and centering over all replicas, each with an exact custom gradient.

The only thing these functions need to know of the other replicas is a function that adds tensors
up over them. They call it once in the forward and once in the backward pass; every replica does,
an empty one too, since a missing replica would leave the others waiting.

Between the passes only the input, in its own dtype, and channel vectors are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn.ops.channels import broadcast, channel_count, statistics_dtype, sum_to_channels
from syncbn.ops.kernels import fused_is_faster, gradient_terms, scale_and_offset
from syncbn.ops.moments import Moments, count_elements, local_moments, pack, unpack

AllReduceSum = Callable[[tf.Tensor, str], tf.Tensor]
"""Adds a tensor up over all replicas; the name is the same on each of them for the same call."""


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    all_reduce_sum: AllReduceSum,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes ``x`` with the statistics of all replicas.

    ``y = gamma * (x - mean) / sqrt(variance + epsilon) + beta`` (Ioffe & Szegedy, 2015).

    Args:
        x: The input; floating, rank 2 at least.
        gamma: ``(channels,)``.
        beta: ``(channels,)``.
        axes: The normalized axes, sorted and non-negative.
        epsilon: Added to the variance.
        all_reduce_sum: Adds a tensor up over all replicas.
        mask: From `expand_mask`. It chooses what the statistics are taken of; the whole of ``x`` is
            normalized with them.

    Returns:
        ``y``, shape and dtype of ``x``, and the moments over all replicas, in float32 at least and
        cut off from the gradient.

        The gradient is that of the loss summed over the replicas with respect to this replica's
        ``x``, and this replica's own share in those of ``gamma`` and ``beta``.
    """
    dtype = statistics_dtype(x.dtype)
    fused = fused_is_faster(x, axes)

    @tf.custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Any]:
        moments = _reduced_moments(x, axes, mask, all_reduce_sum)
        count = moments.count
        mean, variance = tf.cast(moments.mean, dtype), tf.cast(moments.variance, dtype)
        # Zero where there is nothing to divide by, which epsilon=0 allows: no NaN comes of it.
        inverse_deviation = tf.math.divide_no_nan(tf.ones([], dtype), tf.sqrt(variance + epsilon))
        scale = gamma * inverse_deviation
        y = scale_and_offset(tf.cast(x, dtype), mean, scale, beta, axes, fused)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # With x^ the normalized input, n the count over all replicas, and both sums over all
            # replicas:  dx = gamma / sigma * (dy - sum(dy) / n - x^ * sum(dy * x^) / n).
            # The sums run over masked elements too, which also were normalized with the
            # statistics; the two corrections go to the elements that made the statistics.
            wide_x = tf.cast(x, dtype)
            terms = gradient_terms(tf.cast(dy, dtype), wide_x, mean, scale, axes, fused, mask)
            dgamma, dbeta = terms.centered_sum * inverse_deviation, terms.sum
            sums = all_reduce_sum(tf.concat([dbeta, dgamma], 0), "gradient")
            sum_dy, sum_dy_x = tf.split(tf.math.divide_no_nan(sums, _per_sum(count, dtype)), 2)
            correction = scale_and_offset(
                wide_x, mean, scale * inverse_deviation * sum_dy_x, scale * sum_dy, axes, fused
            )
            dx = terms.scaled - _where(mask, correction)
            return tf.cast(dx, x.dtype), dgamma, dbeta

        return (tf.cast(y, x.dtype), count, mean, variance), gradient

    y, *moments = normalize(x, tf.cast(gamma, dtype), tf.cast(beta, dtype))
    return y, Moments(*map(tf.stop_gradient, moments))


def center(
    x: tf.Tensor,
    *,
    axes: Sequence[int],
    all_reduce_sum: AllReduceSum,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Subtracts from ``x`` its mean over all replicas.

    Args:
        x: The input; floating, rank 2 at least.
        axes: The axes that keep a mean of their own each, sorted and non-negative.
        all_reduce_sum: Adds a tensor up over all replicas.
        mask: From `expand_mask`. It chooses what the mean is taken of; it is subtracted everywhere.

    Returns:
        ``x - mean``, shape and dtype of ``x``; the count (as in `Moments`) and the mean
        ``(channels,)`` over all replicas, cut off from the gradient. The gradient is that of the
        loss summed over the replicas.
    """
    dtype = statistics_dtype(x.dtype)
    channels = channel_count(x, axes)

    @tf.custom_gradient
    def subtract_mean(x: tf.Tensor) -> tuple[Any, Any]:
        count = count_elements(x, axes, mask)
        total = sum_to_channels(_where(mask, tf.cast(x, dtype)), axes)
        packed = tf.concat([tf.reshape(count, [-1]), total], 0)
        packed = all_reduce_sum(packed, "statistics")
        count, total = tf.split(packed, [packed.shape.as_list()[0] - channels, channels])
        mean = tf.cast(tf.math.divide_no_nan(total, count), dtype)
        y = tf.cast(x, dtype) - broadcast(mean, x, axes)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
            wide_dy = tf.cast(dy, dtype)
            sum_dy = all_reduce_sum(sum_to_channels(wide_dy, axes), "gradient")
            mean_dy = tf.cast(tf.math.divide_no_nan(sum_dy, count), dtype)
            correction = tf.broadcast_to(broadcast(mean_dy, x, axes), tf.shape(x))
            return tf.cast(wide_dy - _where(mask, correction), x.dtype)

        return (tf.cast(y, x.dtype), count, mean), gradient

    y, count, mean = subtract_mean(x)
    if count.shape[0] != channels:
        count = tf.reshape(count, [])
    return y, tf.stop_gradient(count), tf.stop_gradient(mean)


def _reduced_moments(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None, all_reduce_sum: AllReduceSum
) -> Moments:
    packed = pack(local_moments(x, axes, mask))
    return unpack(all_reduce_sum(packed, "statistics"), channel_count(x, axes))


def _per_sum(count: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The count for each of the two sums in a row."""
    count = tf.cast(count, dtype)
    return count if count.shape.rank == 0 else tf.concat([count, count], 0)


def _where(mask: tf.Tensor | None, x: tf.Tensor) -> tf.Tensor:
    return x if mask is None else tf.where(mask, x, tf.zeros([], x.dtype))
