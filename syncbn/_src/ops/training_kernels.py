"""TensorFlow's fused batch norm in its training form, which computes the statistics itself.

Its accuracy is that of the kernel, so XLA must not compute it another way. TensorFlow's gradients
of it leave out the contribution of the moments, so do not differentiate these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.channels import channel_count
from syncbn._src.ops.kernels import as_rows, shaped_like


def rough_moments(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and biased variance of ``x``, ``(channels,)`` each.

    Two passes, but each sums all rows in float32: over n of them the mean can be off by
    ``n * 2**-24`` of the mean magnitude, and the variance by the square of that. NaN for no rows.
    """
    channels = channel_count(x, axes)
    return normalize_single_replica(x, tf.ones([channels]), tf.zeros([channels]), 1.0, axes)[1:]


def normalize_single_replica(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns ``x`` normalized with its own moments, and these, as from `rough_moments`."""
    with xla.kept_out_of(x):
        outputs = tf.raw_ops.FusedBatchNormV3(
            x=as_rows(x, axes),
            scale=scale,
            offset=offset,
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=epsilon,
            is_training=True,
        )
    rows = tf.cast(tf.size(x, tf.int64) // channel_count(x, axes), tf.float32)
    # The kernel returns the unbiased variance.
    variance = outputs.batch_variance * (tf.maximum(rows - 1, 1) / rows)
    return tf.cast(shaped_like(x, outputs.y), x.dtype), outputs.batch_mean, variance


def single_replica_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    scale: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
    axes: Sequence[int],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the gradients of `normalize_single_replica` for ``x``, ``scale`` and ``offset``.

    ``mean`` and ``variance`` are those of ``x``.
    """
    # This is only called on CPUs, where the second reserve is the variance.
    with xla.kept_out_of(x):
        outputs = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=as_rows(dy, axes),
            x=as_rows(x, axes),
            scale=scale,
            reserve_space_1=mean,
            reserve_space_2=variance,
            reserve_space_3=tf.zeros([0]),
            epsilon=epsilon,
            is_training=True,
        )
    dx = tf.cast(shaped_like(x, outputs.x_backprop), x.dtype)
    return dx, outputs.scale_backprop, outputs.offset_backprop
