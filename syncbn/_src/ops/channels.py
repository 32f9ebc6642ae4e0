"""Where the channels of a tensor are: axes, flat channel vectors, and how they broadcast.

Everything below the layers works with *channel vectors*: flat tensors of shape ``(channels,)``,
where ``channels`` is the product of the sizes of the normalized axes. One axis or several, first
or last, then make no difference to the mathematics.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.ops import xla

_BLOCK = 64  # rows that are summed in the dtype of the elements
# Fewer elements than this are summed in float64 at once: fewer operations, and no slower.
_IN_BLOCKS_FROM_ELEMENTS = 1 << 17


def integer_axes(axis: Any) -> int | list[int]:
    """Returns ``axis`` as an integer, or as several in a list.

    Raises:
        TypeError: it is neither.
    """
    try:
        if isinstance(axis, Sequence) and not isinstance(axis, str):
            return [operator.index(one) for one in axis]
        return operator.index(axis)
    except TypeError as error:
        raise TypeError(
            f"`axis` must be an integer, or several of them. Received: axis={axis!r}. "
            "Use axis=-1 for channels-last data and axis=1 for channels-first data."
        ) from error


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


def channels_are_last(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Says whether the last dimension of ``x``, and no other, has the channels."""
    return tuple(axes) == (x.shape.rank - 1,)


def channel_count(x: tf.Tensor, axes: Sequence[int]) -> int:
    """Returns how many channels ``x`` has: the product of the sizes of ``axes``."""
    shape = x.shape.as_list()
    return math.prod(shape[one] for one in axes)


def broadcast_channels(vector: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Reshapes a channel vector so that it broadcasts against ``x``."""
    if channels_are_last(x, axes):
        return vector  # it broadcasts as it is
    shape = x.shape.as_list()
    return tf.reshape(vector, [size if one in axes else 1 for one, size in enumerate(shape)])


def sum_to_channels(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Sums ``x`` over all but ``axes``. Returns a float64 channel vector.

    In two stages, as in pairwise summation (Higham, 1993): blocks in the dtype of ``x``, and the
    blocks' sums in float64. In one stage, TensorFlow's mean of a million float32 elements around
    1e4 is off by 12 or more; in two it is right to 1e-3, and no slower. Few elements are summed in
    float64, one after the other.
    """
    rank = x.shape.rank
    few = x.shape.is_fully_defined() and x.shape.num_elements() < _IN_BLOCKS_FROM_ELEMENTS
    by_xla = xla.compiles_everything() or xla.on_gpus()
    if few and channels_are_last(x, axes) and not by_xla:
        # A sum over all dimensions but the last, on CPUs up to twice as fast as `tf.reduce_sum`.
        return tf.raw_ops.BiasAddGrad(out_backprop=tf.cast(x, tf.float64))
    if tuple(axes) == tuple(range(rank - len(axes), rank)):
        channels = channel_count(x, axes)
        return _sum_rows(tf.reshape(x, [-1, channels]), channels, known_rows(x, axes))
    # The dimensions after the channels are contiguous, and TensorFlow itself sums those pairwise.
    # XLA does not, but it fuses the cast to float64 into the sum.
    reduced = reduction_axes(rank, axes)
    behind = [axis for axis in reduced if axis > max(axes)]
    if behind and not xla.compiles_everything():
        x = tf.reduce_sum(x, behind, keepdims=True)
    return tf.reshape(tf.reduce_sum(tf.cast(x, tf.float64), reduced), [-1])


def _sum_rows(x: tf.Tensor, channels: int, rows: int | None) -> tf.Tensor:
    """Sums ``(rows, channels)`` over the rows, whose number may be known."""
    if rows is not None and rows <= _BLOCK:
        return tf.cast(tf.reduce_sum(x, 0), tf.float64)
    number = (tf.shape(x, tf.int64)[0] if rows is None else rows) // _BLOCK
    whole = number * _BLOCK
    blocks = tf.reduce_sum(tf.reshape(x[:whole], [number, _BLOCK, channels]), 1)
    total = tf.reduce_sum(tf.cast(blocks, tf.float64), 0)
    if rows is not None and rows == whole:
        return total
    return total + tf.cast(tf.reduce_sum(x[whole:], 0), tf.float64)


def known_rows(x: tf.Tensor, axes: Sequence[int]) -> int | None:
    """Returns the number of elements per channel of ``x``, or ``None`` where it is not static."""
    shape = x.shape.as_list()
    sizes = [shape[axis] for axis in reduction_axes(len(shape), axes)]
    return None if None in sizes else math.prod(sizes)


def where(mask: tf.Tensor | None, x: tf.Tensor) -> tf.Tensor:
    """Returns ``x`` with zeros where ``mask`` is false; ``x`` itself without a mask."""
    return x if mask is None else tf.where(mask, x, tf.zeros([], x.dtype))


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype for statistics of ``dtype`` inputs: float32 at least."""
    return tf.float64 if dtype == tf.float64 else tf.float32
