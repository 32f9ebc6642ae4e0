"""Where the channels of a tensor are: axes, flat channel vectors, and how they broadcast.

Everything below the layers works with *channel vectors*: flat tensors of shape ``(channels,)``,
where ``channels`` is the product of the sizes of the normalized axes. One axis or several, first
or last, then make no difference to the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf


def normalized_axes(axis: int | Sequence[int], shape: Sequence[int | None]) -> tuple[int, ...]:
    """Returns ``axis`` as sorted non-negative dimensions of ``shape``, whose sizes are known.

    Args:
        axis: An integer or several; negative ones count from the end.
        shape: The input's shape, batch included; unknown sizes are ``None``.

    Raises:
        ValueError: an axis outside of the input, named twice, or of unknown size.
    """
    shape = tuple(shape)
    axes = [axis] if isinstance(axis, int) else list(axis)
    rank = len(shape)
    if not axes or any(not -rank <= one < rank for one in axes):
        raise ValueError(
            "`axis` must name dimensions of the input. "
            f"Received: axis={axis} for input shape {shape}. "
            "Use axis=-1 for channels-last data and axis=1 for channels-first data."
        )
    positive = sorted(one % rank for one in axes)
    if len(set(positive)) != len(positive):
        raise ValueError(
            "`axis` must name each dimension once. "
            f"Received: axis={axis} for input shape {shape}. Remove the repeated one."
        )
    unknown = [one for one in positive if shape[one] is None]
    if unknown:
        raise ValueError(
            "The normalized `axis` must have a known size, since the weights have its shape. "
            f"Received: axis={axis} for input shape {shape}. "
            "Give the model an input shape with that size."
        )
    return tuple(positive)


def reduction_axes(rank: int, axes: Sequence[int]) -> list[int]:
    """Returns the dimensions over which statistics are taken: all but the channels'."""
    return [dimension for dimension in range(rank) if dimension not in axes]


def channel_count(x: tf.Tensor, axes: Sequence[int]) -> int:
    """Returns how many channels ``x`` has: the product of the sizes of ``axes``."""
    return math.prod(x.shape[one] for one in axes)


def broadcast(vector: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Reshapes a channel vector so that it broadcasts against ``x``."""
    rank = x.shape.rank
    if tuple(axes) == (rank - 1,):
        return vector  # channels last: it broadcasts as it is
    return tf.reshape(vector, [x.shape[one] if one in axes else 1 for one in range(rank)])


def sum_to_channels(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Sums ``x`` over all but ``axes``. Returns a channel vector."""
    total = tf.reduce_sum(x, reduction_axes(x.shape.rank, axes))
    return total if len(axes) == 1 else tf.reshape(total, [-1])


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype in which statistics of ``dtype`` inputs are taken: float32 at least."""
    return tf.float64 if dtype == tf.float64 else tf.float32
