"""TensorFlow's fused batch norm in its training form, which takes the statistics itself.

Its accuracy is that of the kernel, so XLA must not compute it another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from syncbn.ops import xla
from syncbn.ops.channels import channel_count
from syncbn.ops.differentiation import with_recomputed_gradient
from syncbn.ops.kernels import as_rows, shaped_like


def rough_moments(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and biased variance of ``x`` by the fused kernel, ``(channels,)`` each.

    Two passes, but each adds up all rows in float32: after n of them the mean can be off by
    ``n * 2**-24`` of the mean magnitude, and the variance by the square of that. NaN for no rows.
    """
    return _rough_moments(tuple(axes))(x)


@functools.cache
def _rough_moments(axes: tuple[int, ...]) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    def plain(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _plain_moments(tf.cast(x, tf.float32))

    def kernel(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        channels = channel_count(x, axes)
        # What is normalized goes no further than here, or an eager tape would keep it.
        return _training_form(x, tf.ones([channels]), tf.zeros([channels]), 1.0, axes)[1:]

    return with_recomputed_gradient(plain, kernel)


def normalize_alone(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns ``x`` normalized with its own moments, and these: those of `rough_moments`."""
    return _normalize_alone(tuple(axes), epsilon)(x, scale, offset)


@functools.cache
def _normalize_alone(
    axes: tuple[int, ...], epsilon: float
) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    def plain(
        x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        wide_x = tf.cast(x, scale.dtype)
        mean, variance = _plain_moments(wide_x)
        y = (wide_x - mean) * (scale * tf.math.rsqrt(variance + epsilon)) + offset
        return tf.cast(y, x.dtype), mean, variance

    def kernel(
        x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return _training_form(x, scale, offset, epsilon, axes)

    return with_recomputed_gradient(plain, kernel)


def _training_form(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
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
    y = tf.cast(shaped_like(x, outputs.y), x.dtype)
    return y, outputs.batch_mean, variance


def gradient_alone(
    dy: tf.Tensor,
    x: tf.Tensor,
    scale: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
    axes: Sequence[int],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the gradients of `normalize_alone` for ``x``, ``scale`` and ``offset``.

    ``mean`` and ``variance`` are those of ``x``.
    """
    return _gradient_alone(tuple(axes), epsilon)(dy, x, scale, mean, variance)


@functools.cache
def _gradient_alone(
    axes: tuple[int, ...], epsilon: float
) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    def plain(
        dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        wide_dy, inverse_deviation = tf.cast(dy, scale.dtype), tf.math.rsqrt(variance + epsilon)
        normalized = (tf.cast(x, scale.dtype) - mean) * inverse_deviation
        product, rows = wide_dy * normalized, _reduced(x)
        share = tf.reduce_mean(wide_dy, rows) + normalized * tf.reduce_mean(product, rows)
        dx = tf.cast(scale * inverse_deviation * (wide_dy - share), x.dtype)
        return dx, tf.reduce_sum(product, rows), tf.reduce_sum(wide_dy, rows)

    def kernel(
        dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # On CPUs, where alone this is called, the second reserve is the variance.
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

    return with_recomputed_gradient(plain, kernel)


def _plain_moments(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    # `tf.nn.moments` stops a gradient, and is wrong from the second derivative on.
    mean = tf.reduce_mean(x, _reduced(x))
    return mean, tf.reduce_mean(tf.square(x - mean), _reduced(x))


def _reduced(x: tf.Tensor) -> list[int]:
    return list(range(x.shape.rank - 1))
