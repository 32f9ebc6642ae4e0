"""Count, mean and variance: of one replica, on the wire, and of all replicas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.channels import (
    broadcast_channels,
    channel_count,
    channels_are_last,
    reduction_axes,
    statistics_dtype,
    sum_to_channels,
    where,
)
from syncbn._src.ops.differentiation import compiled, with_recomputed_gradient
from syncbn._src.ops.kernels import MOST_FUSED_ROWS, choose_kernels
from syncbn._src.ops.training_kernels import rough_moments

# benchmarks/studies/kernel_times.py measures it; docs/design.md has the figures.
_MOST_WIDENED_ELEMENTS = 1 << 15


class Sums(NamedTuple):
    """What a batch contributes to the statistics, in float64: replicas are merged by summing.

    In float64 the raw second moment keeps the variance of float32 inputs, up to means of a million
    standard deviations.
    """

    count: tf.Tensor
    """Elements per channel; ``(1,)`` where the channels are last, else ``(channels,)``."""
    first: tf.Tensor
    """The sum of the elements, ``(channels,)``."""
    second: tf.Tensor | None = None
    """The sum of their squares, ``(channels,)``. ``None`` where no variance is needed."""


class Moments(NamedTuple):
    """Statistics of a batch. An empty batch has count, mean and variance zero."""

    count: tf.Tensor
    """As in `Sums`."""
    mean: tf.Tensor
    """``(channels,)``"""
    variance: tf.Tensor | None
    """``(channels,)``, biased: divided by ``count``. ``None`` where it is not needed."""


def expand_mask(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns ``mask`` as booleans that broadcast against ``x``.

    Args:
        mask: One dimension fewer than ``x``, as in Keras: it covers all dimensions but the last.
            With still fewer, it covers the leading ones, such as batch and time. If its rank is not
            static, it must be that of ``x`` minus one.

    Raises:
        ValueError: a mask of another rank, or of other sizes, where these are static. Elsewhere
            an operation fails that names the requirement.
    """
    mask, rank = tf.convert_to_tensor(mask), x.shape.rank - 1
    if mask.shape.rank is None:
        mask = tf.ensure_shape(mask, [None] * rank)
    if not 1 <= mask.shape.rank <= rank:
        raise ValueError(
            "`mask` must have at least one dimension fewer than the input: it covers the leading "
            f"ones. Received: mask shape {tuple(mask.shape)} for input shape {tuple(x.shape)}."
        )
    pairs = list(zip(mask.shape.as_list(), x.shape.as_list(), strict=False))
    if any(size not in (None, 1, whole) and whole is not None for size, whole in pairs):
        raise ValueError(
            "`mask` must have the sizes of the input's leading dimensions, such as batch and time. "
            f"Received: mask shape {tuple(mask.shape)} for input shape {tuple(x.shape)}. Pass "
            "the mask of this batch."
        )
    if any(size != 1 and None in (size, whole) for size, whole in pairs):
        # Where sizes differ, this operation fails, and says by its name what was required.
        sizes = tf.shape(x)[: mask.shape.rank]
        mask = tf.broadcast_to(mask, sizes, name="a_mask_must_have_the_sizes_of_its_input")
    missing = rank - mask.shape.rank
    return tf.cast(mask, tf.bool)[(..., *[None] * (missing + 1))]


def count_elements(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None = None) -> tf.Tensor:
    """Returns the number of elements of ``x`` per channel, under ``mask``; float64.

    ``(1,)`` where the channels are the last axis. Elsewhere ``(channels,)``, since a mask can
    differ from channel to channel there; without a mask too, since another replica may have one.
    """
    if channels_are_last(x, axes):
        shape = tf.shape(x, tf.int64)[:-1]
        if mask is not None:
            seen = tf.cast(tf.broadcast_to(mask[..., 0], shape), tf.float64)
            return tf.reshape(tf.reduce_sum(seen), [1])
        sizes = x.shape.as_list()[:-1]
        if None not in sizes:
            return tf.constant([math.prod(sizes)], tf.float64)
        return tf.reduce_prod(tf.cast(shape, tf.float64), keepdims=True)
    if mask is not None:
        return sum_to_channels(
            tf.cast(tf.broadcast_to(mask, tf.shape(x, tf.int64)), tf.float64), axes
        )
    others = tf.constant(reduction_axes(x.shape.rank, axes), tf.int32)  # there may be none
    reduced = tf.gather(tf.shape(x, tf.int64), others)
    return tf.fill([channel_count(x, axes)], tf.reduce_prod(tf.cast(reduced, tf.float64)))


def local_sums(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None = None, squares: bool = True
) -> Sums:
    """Returns this replica's sums.

    Args:
        x: The input, of any floating dtype and of rank 2 at least.
        axes: The normalized axes, sorted and non-negative.
        mask: From `expand_mask`; the statistics leave out elements where it is false.
        squares: Whether to sum the squares too.
    """
    kernels = choose_kernels(x, axes)
    if kernels.compiled:
        inputs = [x] if mask is None else [x, mask]
        return Sums(*_compiled_sums(tuple(axes), squares)(*inputs))
    count = count_elements(x, axes, mask)
    if squares and mask is None and kernels.fused:
        return Sums(count, *_checked_sums(tuple(axes))(x, count))
    return Sums(count, *exact_sums(x, count, axes, mask, squares))


def is_reliable(rough: Moments) -> tf.Tensor:
    """Says whether moments from TensorFlow's fused kernel (`rough_moments`) are accurate enough."""
    # Accept them only if the kernel's mean is off by a hundredth of the standard deviation at most,
    # even in the worst case: then its variance is off by 1e-4. That excludes means that are large
    # beside the deviation, sums of squares that overflow, and no rows, which make NaN of both; NaN
    # compares false.
    mean, variance = (tf.cast(part, tf.float64) for part in rough[1:])
    reliable = tf.square(rough.count * 2.0**-24 * mean) <= 1e-4 * variance
    reliable &= variance < np.inf
    return tf.reduce_all(reliable & (rough.count <= MOST_FUSED_ROWS))


def widened(moments: Moments) -> Moments:
    """Returns the moments in float64."""
    return Moments(*(tf.cast(part, tf.float64) for part in moments))


@functools.cache
def _checked_sums(axes: tuple[int, ...]) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    def kernel(x: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rough = Moments(count, *rough_moments(x, axes))
        return tf.cond(
            is_reliable(rough),
            lambda: sums_of(widened(rough))[1:],
            lambda: exact_sums(x, count, axes, None),
        )

    return with_recomputed_gradient(axes, _exact(axes, squares=True), kernel)


def exact_sums(
    x: tf.Tensor,
    count: tf.Tensor,
    axes: Sequence[int],
    mask: tf.Tensor | None,
    squares: bool = True,
) -> tuple[tf.Tensor, ...]:
    """Returns the sums of the elements and of their squares, float64, accurate for any mean.

    Few elements, or those that XLA compiles, are summed in float64, as accurate as what is sent.
    Otherwise the second of two passes is about a pivot, the mean of the first pass, and the error
    of that is corrected: the corrected two-pass algorithm of Chan, Golub & LeVeque, "Algorithms for
    Computing the Sample Variance" (1983), equation 1.7, and its counterpart for the mean.
    """
    inputs = [x, count] if mask is None else [x, count, mask]
    return _exact_sums(tuple(axes), squares)(*inputs)


@functools.cache
def _exact_sums(axes: tuple[int, ...], squares: bool) -> Callable[..., tuple[tf.Tensor, ...]]:
    return with_recomputed_gradient(axes, _exact(axes, squares))


def _exact(axes: tuple[int, ...], squares: bool) -> Callable[..., tuple[tf.Tensor, ...]]:
    def sums(
        x: tf.Tensor, count: tf.Tensor, mask: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, ...]:
        if _is_small(x) and not xla.compiles_everything():
            wide = tf.cast(where(mask, x), tf.float64)
            parts = (wide, tf.square(wide)) if squares else (wide,)
            return tuple(_sum_at_once(part, axes) for part in parts)
        centered, pivot = _channels_about_pivot(x, count, axes, mask)
        off, at_pivot = _sum(centered, axes), count * pivot
        first = at_pivot + off
        if not squares:
            return (first,)
        second = _sum(tf.square(centered), axes) + pivot * (at_pivot + 2.0 * off)
        return first, second

    return sums


@functools.cache
def _compiled_sums(axes: tuple[int, ...], squares: bool) -> Callable[..., tuple[tf.Tensor, ...]]:
    def sums(x: tf.Tensor, mask: tf.Tensor | None = None) -> tuple[tf.Tensor, ...]:
        count = count_elements(x, axes, mask)
        return count, *exact_sums(x, count, axes, mask, squares)

    return compiled(sums, axes)


def _is_small(x: tf.Tensor) -> bool:
    """Says whether fewer operations, in float64, are faster than more in the dtype of ``x``."""
    return x.shape.is_fully_defined() and x.shape.num_elements() <= _MOST_WIDENED_ELEMENTS


def _sum(centered: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    return (_sum_at_once if xla.compiles_everything() else sum_to_channels)(centered, axes)


def _sum_at_once(wide: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    return tf.reshape(tf.reduce_sum(wide, reduction_axes(wide.shape.rank, axes)), [-1])


def _channels_about_pivot(
    x: tf.Tensor, count: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns ``x`` minus a pivot near its mean, and the pivot, float64."""
    if xla.compiles_everything():
        # It fuses the cast to float64 into the sum. In float64 any element is near enough to the
        # mean to be the pivot, which saves a pass; a masked one counts as zero.
        one = tuple(slice(None if axis in axes else 1) for axis in range(x.shape.rank))
        wide = tf.cast(where(mask, x), tf.float64)
        pivot = tf.stop_gradient(_sum_at_once(wide[one], axes))
        return where(mask, wide - broadcast_channels(pivot, x, axes)), pivot
    return about_pivot(
        tf.cast(x, statistics_dtype(x.dtype)),
        count,
        mask,
        lambda part: sum_to_channels(part, axes),
        lambda pivot: broadcast_channels(pivot, x, axes),
    )


def about_pivot(
    x: tf.Tensor,
    count: tf.Tensor,
    mask: tf.Tensor | None,
    add_up: Callable[[tf.Tensor], tf.Tensor],
    spread: Callable[[tf.Tensor], tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns ``x``, zero where masked, minus a pivot near its mean, and the pivot, float64.

    Args:
        x: In the dtype of statistics.
        count: The number of elements in each sum.
        mask: From `expand_mask`.
        add_up: Sums a tensor like ``x``, in float64.
        spread: Reshapes a tensor like the sums so that it broadcasts against ``x``.
    """
    mean = tf.math.divide_no_nan(add_up(where(mask, x)), count)
    # No result depends on it, so neither does a gradient.
    pivot = tf.stop_gradient(tf.cast(mean, x.dtype))
    return where(mask, x - spread(pivot)), tf.cast(pivot, tf.float64)


def moments_about(
    pivot: tf.Tensor, count: tf.Tensor, first: tf.Tensor, second: tf.Tensor
) -> Moments:
    """Returns moments, given the sums of elements minus ``pivot`` and of the squares of those.

    All are float64.
    """
    off = tf.math.divide_no_nan(first, count)
    variance = not_negative(tf.math.divide_no_nan(second, count) - tf.square(off))
    return Moments(count, pivot + off, variance)


def exact_moments(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None = None) -> Moments:
    """Returns the moments of ``x``, float64, accurate for any mean; arguments as `local_sums`."""
    count = count_elements(x, axes, mask)
    centered, pivot = _channels_about_pivot(x, count, axes, mask)
    return moments_about(pivot, count, _sum(centered, axes), _sum(tf.square(centered), axes))


def sums_of(moments: Moments) -> Sums:
    """Returns the sums that ``moments`` were computed from."""
    return weigh(moments._replace(variance=moments.variance + tf.square(moments.mean)))


def pack(sums: Sums) -> tf.Tensor:
    """Returns the sums as one vector of ``2 * channels + 1`` numbers.

    ``3 * channels`` with counts per channel.
    """
    return tf.concat([part for part in sums if part is not None], -1)


def unpack(packed: tf.Tensor, like: Sums) -> Moments:
    """Returns the moments, float64, of a vector from `pack`, or a sum of them.

    Leading dimensions are kept. ``like``: sums with the shapes of those that were packed.
    """
    return moments_of(_split(packed, like))


def moments_of(sums: Sums) -> Moments:
    """Returns the moments of ``sums``."""
    count, mean, second = _divided(sums)
    return Moments(count, mean, None if second is None else not_negative(second - tf.square(mean)))


def weigh(moments: Moments) -> Sums:
    """Returns the moments times their counts: their sums make an average weighted by count."""
    count, *values = moments
    return Sums(count, *(None if value is None else count * value for value in values))


def average(packed: tf.Tensor, like: Sums) -> Moments:
    """Returns the average, weighted by count, of what `weigh` and `pack` made; see `unpack`."""
    return _divided(_split(packed, like))


def _split(packed: tf.Tensor, like: Sums) -> Sums:
    sizes = [part.shape.as_list()[-1] for part in like if part is not None]
    count, first, *second = tf.split(packed, sizes, -1)
    return Sums(count, first, second[0] if second else None)


def _divided(sums: Sums) -> Moments:
    count, *values = sums
    return Moments(
        count, *(None if one is None else tf.math.divide_no_nan(one, count) for one in values)
    )


def rounded(mean: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns ``mean`` in ``dtype``, and the remainder, in ``dtype`` too.

    Rounding a mean of a million standard deviations to float32 loses a thirtieth of a deviation.
    """
    if dtype == mean.dtype:
        return mean, tf.zeros_like(mean)
    # Not by a cast there and back, which XLA removes on a GPU, but by clearing the bits that
    # float32 does not have. The gradient flows through the remainder.
    bits = tf.bitwise.bitwise_and(tf.bitcast(mean, tf.int64), ~((1 << (52 - 23)) - 1))
    kept = tf.stop_gradient(tf.bitcast(bits, tf.float64))
    return tf.cast(kept, dtype), tf.cast(mean - kept, dtype)


def unbiased(moments: Moments) -> Moments:
    """Applies Bessel's correction. A single element has variance zero, and keeps it."""
    correction = moments.count / tf.maximum(moments.count - 1.0, 1.0)
    return moments._replace(variance=moments.variance * correction)


def cut_off(moments: Moments) -> Moments:
    """Returns the moments with the gradient stopped."""
    return Moments(*(None if part is None else tf.stop_gradient(part) for part in moments))


def not_negative(variance: tf.Tensor) -> tf.Tensor:
    """Returns ``variance``, with zero where rounding has made it negative."""
    # A NaN from the input stays visible: `tf.maximum` propagates it.
    return tf.maximum(variance, tf.zeros([], variance.dtype))
