"""Which kernels to use where: TensorFlow's fused batch norm, or plain operations.

Both give the same answer. TensorFlow's fused kernels read and write memory fewer times but cost
more to start, and exist for float32 with the channels last only. Here they stand for three things:

- the forward kernel in its inference form maps ``x`` to ``(x - mean) * scale + offset``;
- the gradient kernel in its inference form returns ``dy * scale`` and two sums over ``dy``;
- the forward kernel in its training form returns moments, with an error that is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn.ops.channels import broadcast, channel_count, sum_to_channels

# From how many elements on the fused kernels win. Measured on two CPU cores, TensorFlow 2.21,
# medians in one run: normalizing (98, 512) takes 368 us fused and 280 us plain, (392, 1024)
# 558 and 777, (25088, 64) 677 and 1232. `benchmarks/kernels.py` prints the table anew.
FUSED_FROM_ELEMENTS = 1 << 17

# Beyond, the kernels' float32 sums over all rows lose more than the fifth digit.
MOST_FUSED_ROWS = 1 << 17

# The fused kernels multiply by rsqrt(variance + epsilon). With these two that factor is exactly
# one, so the scale is ours alone, and cuDNN's lower bound for epsilon (1e-5) is kept.
_EPSILON = 2.0**-10
_UNIT_VARIANCE = 1.0 - _EPSILON


def fused_is_faster(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Says whether the fused kernels serve ``x`` and are the faster choice for its static shape."""
    if x.dtype == tf.float64 or tuple(axes) != (x.shape.rank - 1,):
        return False
    # An unknown size, that of the batch mostly, counts as one.
    elements = math.prod(size or 1 for size in x.shape)
    return elements >= FUSED_FROM_ELEMENTS and elements <= MOST_FUSED_ROWS * x.shape[-1]


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

    def plain(x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        mean, scale, offset = (broadcast(vector, x, axes) for vector in vectors)
        return (x - mean) * scale + offset

    def kernel(x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        mean, scale, offset = vectors
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

    inputs = (x, mean, scale, offset)
    return _with_gradient_of(plain, kernel, inputs) if fused else plain(*inputs)


class GradientTerms(NamedTuple):
    """What the gradient kernel makes of ``dy`` and ``x``."""

    scaled: tf.Tensor
    """``dy * scale``, shape and dtype of ``dy``."""
    sum: tf.Tensor
    """The sum of ``dy``, float64 ``(channels,)``."""
    centered_sum: tf.Tensor
    """The sum of ``dy * (x - mean)``, float64 ``(channels,)``."""


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

    def plain(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tuple[tf.Tensor, ...]:
        mean, scale = (broadcast(vector, x, axes) for vector in vectors)
        centered = x - mean
        # Zero times NaN is NaN: what a mask hides must not come back through a zero gradient.
        product = dy * centered if mask is None else tf.math.multiply_no_nan(centered, dy)
        return dy * scale, sum_to_channels(dy, axes), sum_to_channels(product, axes)

    def kernel(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tuple[tf.Tensor, ...]:
        mean, scale = vectors
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
        scaled = tf.reshape(terms.x_backprop, tf.shape(dy))
        sums = terms.offset_backprop, terms.scale_backprop
        return scaled, *(tf.cast(part, tf.float64) for part in sums)

    inputs = (dy, x, mean, scale)
    if fused and mask is None:
        return GradientTerms(*_with_gradient_of(plain, kernel, inputs))
    return GradientTerms(*plain(*inputs))


def rough_moments(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and biased variance of ``x`` by the fused kernel, ``(channels,)`` each.

    Two passes, but each adds up all rows in float32: after n of them the mean can be off by
    ``n * 2**-24`` of the mean magnitude, and the variance by the square of that. NaN for no rows.
    """

    def plain(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.nn.moments(_rows(x, axes), [0, 1, 2])

    def kernel(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        channels = channel_count(x, axes)
        moments = tf.raw_ops.FusedBatchNormV3(
            x=_rows(x, axes),
            scale=tf.ones([channels]),
            offset=tf.zeros([channels]),
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=_EPSILON,
            is_training=True,
        )
        rows = tf.cast(tf.size(x, tf.int64) // channels, tf.float32)
        # The kernel returns the unbiased variance.
        return moments.batch_mean, moments.batch_variance * (tf.maximum(rows - 1, 1) / rows)

    return _with_gradient_of(plain, kernel, (x,))


def _with_gradient_of(plain: Callable, kernel: Callable, inputs: tuple[tf.Tensor, ...]) -> Any:
    """Runs ``kernel``, and differentiates ``plain``, which gives the same answer.

    TensorFlow's own gradients of these kernels leave out what moments and means contribute, which
    only a second derivative asks for.
    """

    @tf.custom_gradient
    def call(*inputs: tf.Tensor) -> tuple[Any, Callable]:
        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = tf.nest.flatten(plain(*inputs))
            return tape.gradient(outputs, inputs, upstream)

        return kernel(*inputs), gradient

    return call(*inputs)


def _rows(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    # The kernels want four dimensions; a reshape copies nothing.
    return tf.reshape(x, [-1, 1, 1, channel_count(x, axes)])
