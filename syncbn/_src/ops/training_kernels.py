"""TensorFlow's fused batch norm in its training form, which computes the statistics itself.

Its accuracy is that of the kernel, so XLA must not compute it another way. TensorFlow's gradients
of it leave out the contribution of the moments, so do not differentiate these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from syncbn._src.ops.channels import channel_count
from syncbn._src.ops.kernels import fused_forward


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
    y, mean, unbiased_variance = fused_forward(x, scale, offset, epsilon, axes)
    rows = tf.cast(tf.size(x, tf.int64) // channel_count(x, axes), tf.float32)
    return y, mean, unbiased_variance * (tf.maximum(rows - 1, 1) / rows)
