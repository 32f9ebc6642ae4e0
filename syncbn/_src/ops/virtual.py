"""Virtual batches: normalization with the statistics of slices of one replica's batch.

Hoffer, Hubara & Soudry, "Train longer, generalize better" (2017), call it ghost batch
normalization. The outputs need no statistics of other replicas, so plain operations and their own
gradients are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from syncbn._src.ops.channels import (
    channel_count,
    channels_are_last,
    reduction_axes,
    statistics_dtype,
)
from syncbn._src.ops.moments import (
    Moments,
    about_pivot,
    average,
    moments_about,
    pack,
    unbiased,
    weigh,
)
from syncbn._src.ops.normalization import Correction
from syncbn._src.ops.replicas import Replicas


def virtual_batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    size: int,
    replicas: Replicas,
    mask: tf.Tensor | None = None,
    correction: Correction | None = None,
    bessel: bool = False,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes ``x`` slice by slice.

    Arguments and results as in `batch_normalize`, with these differences: there are as few slices
    as possible with at most ``size`` samples each; with s slices, sample i is in slice ``i % s``,
    as in Keras 2. The moments for the moving statistics are the average of those of all slices of
    all replicas, weighted by count, and `correction` is computed for that average.
    """
    dtype = statistics_dtype(x.dtype)
    wide_x = tf.cast(x, dtype)
    of_samples, moments = _slices(wide_x, axes, size, mask)
    taken_up = _average(unbiased(moments) if bessel else moments, replicas)
    mean, variance = (tf.cast(part, dtype) for part in moments[1:])
    scale = gamma * tf.math.divide_no_nan(tf.ones([], dtype), tf.sqrt(variance + epsilon))
    if correction is not None:
        r, d = map(tf.stop_gradient, correction(*(tf.cast(part, dtype) for part in taken_up[1:])))
        scale, beta = scale * r, beta + gamma * d
    offset = tf.broadcast_to(beta, tf.shape(scale))
    mean, scale, offset = (
        _to_samples(tf.gather(part, of_samples), x, axes) for part in (mean, scale, offset)
    )
    # Its gradient is zero where that of y is, even where a mask hides a NaN of x.
    multiply = tf.multiply if mask is None else tf.math.multiply_no_nan
    y = multiply(wide_x - mean, tf.broadcast_to(scale, tf.shape(x, tf.int64))) + offset
    return tf.cast(y, x.dtype), taken_up


def _slices(
    x: tf.Tensor, axes: Sequence[int], size: int, mask: tf.Tensor | None
) -> tuple[tf.Tensor, Moments]:
    """Returns each sample's slice, ``(batch,)``, and the moments, float64, a row for each slice."""
    batch = tf.shape(x, tf.int64)[0]
    number = -(-batch // size)
    of_samples = tf.range(batch) % tf.maximum(number, 1)

    def per_slice(samples: tf.Tensor) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(samples, of_samples, number)

    def add_up(part: tf.Tensor) -> tf.Tensor:
        return per_slice(_sample_sums(part, axes))

    def spread(rows: tf.Tensor) -> tf.Tensor:
        return _to_samples(tf.gather(rows, of_samples), x, axes)

    count = per_slice(_sample_counts(x, axes, mask))
    centered, pivot = about_pivot(x, count, mask, add_up, spread)
    moments = moments_about(pivot, count, add_up(centered), add_up(tf.square(centered)))
    return of_samples, moments


def _average(moments: Moments, replicas: Replicas) -> Moments:
    weighed = weigh(moments)
    total = tf.stop_gradient(tf.reduce_sum(pack(weighed), 0))
    return average(replicas.all_reduce_sum(total, "moving"), weighed)


def _sample_counts(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> tf.Tensor:
    """Elements per channel of each sample, float64: ``(batch, 1)`` where the channels are last."""
    if mask is not None:
        seen = tf.cast(tf.broadcast_to(mask, tf.shape(x, tf.int64)), tf.float64)
        counts = _sample_sums(seen, axes)
        return counts[:, :1] if channels_are_last(x, axes) else counts
    columns = 1 if channels_are_last(x, axes) else channel_count(x, axes)
    inner = tf.constant(reduction_axes(x.shape.rank, axes)[1:], tf.int32)  # none in rank 2
    elements = tf.reduce_prod(tf.cast(tf.gather(tf.shape(x, tf.int64), inner), tf.float64))
    return tf.fill([tf.shape(x, tf.int64)[0], columns], elements)


def _sample_sums(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Sums over each sample, float64 ``(batch, channels)``."""
    sums = tf.reduce_sum(tf.cast(x, tf.float64), reduction_axes(x.shape.rank, axes)[1:])
    return tf.reshape(sums, [-1, channel_count(x, axes)])


def _to_samples(rows: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Reshapes ``(batch, channels)`` so that it broadcasts against ``x``."""
    shape = x.shape.as_list()
    sizes = [shape[axis] if axis in axes else 1 for axis in range(1, len(shape))]
    return tf.reshape(rows, [tf.shape(x, tf.int64)[0], *sizes])
