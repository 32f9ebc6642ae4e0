"""Which kernels to use where: TensorFlow's fused batch norm, or plain operations.

Both give the same answer. TensorFlow's fused kernels read and write memory fewer times but cost
more to start, and exist for float32 with the channels last only. Here they stand for two things
that they do in their *inference* form, which, unlike the training form, is right for empty inputs:

- the forward kernel maps ``x`` to ``(x - mean) * scale + offset``;
- the gradient kernel returns ``dy * scale`` and the two sums over ``dy`` in one go.

For the moments, plain operations are as fast and more accurate (see `sum_to_channels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from syncbn.ops.channels import broadcast, channel_count, sum_to_channels

# From how many elements on the fused kernels win. Measured on two CPU cores, TensorFlow 2.21,
# medians in one run: normalizing (98, 512) takes 368 us fused and 280 us plain, (392, 1024)
# 558 and 777, (25088, 64) 677 and 1232. `benchmarks/kernels.py` prints the table anew.
FUSED_FROM_ELEMENTS = 1 << 17

# The fused kernels multiply by rsqrt(variance + epsilon). With these two that factor is exactly
# one, so the scale is ours alone, and cuDNN's lower bound for epsilon (1e-5) is kept.
_EPSILON = 2.0**-10
_UNIT_VARIANCE = 1.0 - _EPSILON


def fused_is_faster(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Says whether the fused kernels serve ``x`` and are the faster choice for its static shape."""
    if x.dtype == tf.float64 or tuple(axes) != (x.shape.rank - 1,):
        return False
    elements = 1
    for size in x.shape:
        elements *= size or 1  # an unknown size, of the batch mostly, counts as one
    return elements >= FUSED_FROM_ELEMENTS


def scale_and_offset(
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    axes: Sequence[int],
    fused: bool,
) -> tf.Tensor:
    """Returns ``(x - mean) * scale + offset``, shape and dtype of ``x``.

    ``mean``, ``scale`` and ``offset`` are channel vectors of the dtype of ``x``. The mean is
    subtracted first: multiplying first would lose the digits of a large mean.
    """
    if not fused:
        mean, scale, offset = (broadcast(v, x, axes) for v in (mean, scale, offset))
        return (x - mean) * scale + offset
    y = tf.raw_ops.FusedBatchNormV3(
        x=_rows(x, axes),
        scale=scale,
        offset=offset,
        mean=mean,
        variance=tf.fill([channel_count(x, axes)], _UNIT_VARIANCE),
        epsilon=_EPSILON,
        is_training=False,
    ).y
    return tf.reshape(y, tf.shape(x))


class GradientTerms(NamedTuple):
    """What the gradient kernel makes of ``dy`` and ``x``, in their dtype."""

    scaled: tf.Tensor
    """``dy * scale``, shape of ``dy``."""
    sum: tf.Tensor
    """The sum of ``dy``, ``(channels,)``."""
    centered_sum: tf.Tensor
    """The sum of ``dy * (x - mean)``, ``(channels,)``."""


def gradient_terms(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    axes: Sequence[int],
    fused: bool,
    mask: tf.Tensor | None = None,
) -> GradientTerms:
    """Returns ``dy * scale`` and this replica's sums of ``dy`` and ``dy * (x - mean)``.

    ``mask`` only says that ``x`` may hold NaN or Inf where ``dy`` is zero.
    """
    if not fused or mask is not None:
        centered = x - broadcast(mean, x, axes)
        # Zero times NaN is NaN: what a mask hides must not come back through a zero gradient.
        product = dy * centered if mask is None else tf.math.multiply_no_nan(centered, dy)
        return GradientTerms(
            dy * broadcast(scale, x, axes),
            tf.cast(sum_to_channels(dy, axes), x.dtype),
            tf.cast(sum_to_channels(product, axes), x.dtype),
        )
    terms = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_rows(dy, axes),
        x=_rows(x, axes),
        scale=scale,
        reserve_space_1=mean,
        reserve_space_2=tf.fill([channel_count(x, axes)], _UNIT_VARIANCE),
        reserve_space_3=tf.zeros([0]),
        epsilon=_EPSILON,
        is_training=False,
    )
    return GradientTerms(
        tf.reshape(terms.x_backprop, tf.shape(dy)), terms.offset_backprop, terms.scale_backprop
    )


def _rows(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    # The kernels want four dimensions; a reshape copies nothing.
    return tf.reshape(x, [-1, 1, 1, channel_count(x, axes)])
