"""Centering over all replicas, with an exact custom gradient.

One collective in the forward and one in the backward pass, as in batch normalization.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._src.ops.channels import broadcast_channels, statistics_dtype, sum_to_channels, where
from syncbn._src.ops.differentiation import (
    compiled,
    in_current_graph,
    kept,
    of_shape,
    with_recomputed_gradient,
)
from syncbn._src.ops.kernels import choose_kernels
from syncbn._src.ops.moments import Moments, cut_off, local_sums, rounded
from syncbn._src.ops.replicas import Replicas


def center(
    x: tf.Tensor, *, axes: Sequence[int], replicas: Replicas, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, Moments]:
    """Subtracts from ``x`` its mean over all replicas.

    Args:
        x: The input; floating, rank 2 at least.
        axes: The channel axes, sorted and non-negative; each channel has its own mean.
        replicas: The replicas to take the mean over.
        mask: From `expand_mask`. The mean leaves out elements where it is false; it is subtracted
            from all.

    Returns:
        ``x - mean``, in the shape and dtype of ``x``, and the moments for the moving mean, without
        a variance and with the gradient stopped. The gradient is that of the loss summed over the
        replicas.
    """
    pieces = _centering(tuple(axes), choose_kernels(x, axes).compiled)
    rest = [] if mask is None else [mask]

    @tf.custom_gradient
    def subtract_mean(x: tf.Tensor) -> tuple[Any, Any]:
        merged, taken_up = replicas.merge(local_sums(x, axes, mask, squares=False))
        y = pieces.outputs(x, merged.mean)
        y.set_shape(x.shape)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
            dy, others = of_shape(dy, x.shape), kept((merged.count, *rest))
            total = replicas.all_reduce_sum(pieces.gradient_sum(dy), "gradient")
            dx = pieces.input_gradient(dy, total, *others)
            dx.set_shape(x.shape)
            return dx

        return (y, taken_up.count, taken_up.mean), gradient

    y, count, mean = subtract_mean(in_current_graph(x))
    return y, cut_off(Moments(count, mean, None))


class _Centering(NamedTuple):
    """The operations of centering between the collectives."""

    outputs: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    gradient_sum: Callable[[tf.Tensor], tf.Tensor]
    input_gradient: Callable[..., tf.Tensor]


@functools.cache
def _centering(axes: tuple[int, ...], by_xla: bool) -> _Centering:
    def outputs(x: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        wide_x = tf.cast(x, statistics_dtype(x.dtype))
        mean, rest = (broadcast_channels(vector, x, axes) for vector in rounded(mean, wide_x.dtype))
        return tf.cast(wide_x - mean - rest, x.dtype)

    def gradient_sum(dy: tf.Tensor) -> tf.Tensor:
        return sum_to_channels(tf.cast(dy, statistics_dtype(dy.dtype)), axes)

    def input_gradient(
        dy: tf.Tensor, total: tf.Tensor, count: tf.Tensor, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        wide_dy = tf.cast(dy, statistics_dtype(dy.dtype))
        mean_dy = tf.cast(tf.math.divide_no_nan(total, count), wide_dy.dtype)
        shift = broadcast_channels(mean_dy, dy, axes)
        if mask is not None:
            shift = where(mask, tf.broadcast_to(shift, tf.shape(dy, tf.int64)))
        return tf.cast(wide_dy - shift, dy.dtype)

    if by_xla:
        return _Centering(*(compiled(one, axes) for one in (outputs, gradient_sum, input_gradient)))
    return _Centering(with_recomputed_gradient(axes, outputs), gradient_sum, input_gradient)
