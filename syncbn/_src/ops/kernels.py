"""Which kernels to use where: plain operations, TensorFlow's fused batch norm, or compiled ones.

All give the same answer. TensorFlow's fused kernels read and write memory fewer times than plain
operations but cost more to start, and take only channels-last inputs, with statistics in float32.
They are used so:

- the forward kernel in its inference form maps ``x`` to ``(x - mean) * scale + offset``;
- the gradient kernel in its inference form returns ``dy * scale`` and two sums over ``dy``;
- the forward kernel in its training form returns moments, with a known error bound;
- both in their training form do all that a single replica needs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.channels import (
    broadcast_channels,
    channel_count,
    channels_are_last,
    known_rows,
    sum_to_channels,
    where,
)
from syncbn._src.ops.differentiation import with_recomputed_gradient
from syncbn._src.ops.graphs import in_session

# On CPUs, the fused kernels are faster from this many elements on: from the table that
# `benchmarks/studies/kernel_times.py` prints and docs/design.md shows.
FUSED_FROM_ELEMENTS = 1 << 17

# And from this many on for a single replica, whose passes are one of them each.
FUSED_AT_ONCE_FROM_ELEMENTS = 1 << 16

# XLA compiles the input gradient from this many elements on. Compiling takes one or two tenths of a
# second for each shape and device, before the first step; with fewer elements it would save a step
# 0.1 ms.
COMPILED_FROM_ELEMENTS = 1 << 19

# The kernels sum rows in float32, one after the other. With so many, gradient sums are off by 6e-6
# of the sum of magnitudes where dy varies, and by 6e-4 where all rows are equal, so that each
# addition rounds the same way. docs/design.md has figures. `is_reliable` looks after the moments.
MOST_FUSED_ROWS = 1 << 17

# The fused kernels multiply by rsqrt(variance + epsilon). With these two that factor is exactly
# one, so the scale is ours alone.
_EPSILON = 2.0**-10
_UNIT_VARIANCE = 1.0 - _EPSILON


class Kernels(NamedTuple):
    """The kernels chosen for an input."""

    fused: bool
    """Whether to use TensorFlow's fused batch norm, where it applies."""
    compiled_gradient: bool
    """Whether XLA compiles the input gradient."""
    compiled: bool = False
    """Whether XLA compiles everything between the collectives, piece by piece."""


PLAIN = Kernels(fused=False, compiled_gradient=False)


def choose_kernels(
    x: tf.Tensor, axes: Sequence[int], masked: bool = False, at_once: bool = False
) -> Kernels:
    """Returns the fastest kernels that apply to ``x``, by its static shape.

    Args:
        x: The input.
        axes: The normalized axes.
        masked: Whether there is a mask.
        at_once: Whether a kernel can do all of a pass, as on a single replica.
    """
    # A function that XLA compiles as a whole needs no compiled pieces; a session takes none.
    in_function = not in_session()
    if xla.compiles_everything():
        return PLAIN
    if xla.on_gpus():
        return PLAIN._replace(compiled=in_function)
    if x.dtype == tf.float64 or not channels_are_last(x, axes):
        return PLAIN
    # An unknown size, mostly that of the batch, counts as one.
    elements = math.prod(size or 1 for size in x.shape)
    least = FUSED_AT_ONCE_FROM_ELEMENTS if at_once else FUSED_FROM_ELEMENTS
    fused = least <= elements <= MOST_FUSED_ROWS * x.shape[-1]
    # XLA recompiles for each new shape.
    once = x.shape.is_fully_defined() and not tf.executing_eagerly()
    large = fused and elements >= COMPILED_FROM_ELEMENTS
    return Kernels(fused, compiled_gradient=large and once and in_function and not masked)


def scale_and_offset(
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    axes: Sequence[int],
    fused: bool,
) -> tf.Tensor:
    """Returns ``(x - mean) * scale + offset``, shape and dtype of ``x``.

    ``mean``, ``scale`` and ``offset`` are channel vectors of the dtype of statistics. The mean is
    subtracted first: multiplying first would lose the digits of a large mean.
    """
    return _scale_and_offset(tuple(axes), fused)(x, mean, scale, offset)


@functools.cache
def _scale_and_offset(axes: tuple[int, ...], fused: bool) -> Callable[..., tf.Tensor]:
    def plain(x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        mean, scale, offset = (broadcast_channels(vector, x, axes) for vector in vectors)
        return tf.cast((tf.cast(x, mean.dtype) - mean) * scale + offset, x.dtype)

    def kernel(x: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        moments = mean, _unit_variance(x, axes)
        return fused_forward(x, scale, offset, _EPSILON, axes, moments)[0]

    return with_recomputed_gradient(axes, plain, kernel if fused else None)


def gradient_sums(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    axes: Sequence[int],
    kernels: Kernels,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the sums of ``dy`` and of ``dy * (x - mean)``, float64, and ``dy * scale``.

    The kernel computes the last as well. With `kernels.compiled_gradient` it has the dtype of
    ``dy`` and is unused; otherwise it has that of ``scale``. ``mask`` only says that ``x`` may hold
    NaN or Inf where ``dy`` is zero.
    """
    if not kernels.compiled_gradient:  # which uses only the sums
        dy, x = tf.cast(dy, scale.dtype), tf.cast(x, scale.dtype)

    operation = _gradient_sums(tuple(axes), kernels.fused and mask is None, mask is not None)
    return operation(dy, x, mean, scale)


@functools.cache
def _gradient_sums(
    axes: tuple[int, ...], fused: bool, masked: bool
) -> Callable[..., tuple[tf.Tensor, ...]]:
    def plain(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tuple[tf.Tensor, ...]:
        mean, scale = (broadcast_channels(vector, x, axes) for vector in vectors)
        wide_dy, centered = tf.cast(dy, scale.dtype), tf.cast(x, mean.dtype) - mean
        # Zero times NaN is NaN: what a mask hides must not come back through a zero gradient.
        multiply = tf.math.multiply_no_nan if masked else tf.multiply
        sums = (sum_to_channels(part, axes) for part in (wide_dy, multiply(centered, wide_dy)))
        return *sums, tf.cast(wide_dy * scale, dy.dtype)

    def kernel(
        dy: tf.Tensor, x: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        def sums() -> tuple[tf.Tensor, ...]:
            scaled, *both = fused_gradient(
                dy, x, scale, mean, _unit_variance(x, axes), _EPSILON, axes, training=False
            )
            centered, first = (tf.cast(part, tf.float64) for part in both)
            return first, centered, scaled

        if known_rows(x, axes) is not None:
            return sums()
        few = tf.size(x, tf.int64) <= MOST_FUSED_ROWS * channel_count(x, axes)
        return tf.cond(few, sums, lambda: plain(dy, x, mean, scale))

    return with_recomputed_gradient(axes, plain, kernel if fused else None)


def input_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    scaled: tf.Tensor | None,
    slope: tf.Tensor,
    offset: tf.Tensor,
    axes: Sequence[int],
    kernels: Kernels,
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns ``dy * scale - ((x - mean) * slope + offset)``, shape and dtype of ``x``.

    ``scaled`` is the last result of `gradient_sums` for the same arguments, or ``None`` if that
    was not kept. Where ``mask`` is false, the result is ``dy * scale``.
    """
    if kernels.compiled_gradient:
        return _compiled_affine_input_gradient(tuple(axes))(dy, x, mean, scale, slope, offset)
    if scaled is None:
        scaled = tf.cast(dy, scale.dtype) * broadcast_channels(scale, dy, axes)
    wide_x = tf.cast(where(mask, x), mean.dtype)
    shift = scale_and_offset(wide_x, mean, slope, offset, axes, kernels.fused)
    return tf.cast(scaled - where(mask, shift), x.dtype)


@functools.cache
def _compiled_affine_input_gradient(axes: tuple[int, ...]) -> Callable[..., tf.Tensor]:
    def plain(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        return _affine_input_gradient(
            dy, x, *(broadcast_channels(vector, x, axes) for vector in vectors)
        )

    def kernel(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        rows = (tf.reshape(part, [-1, channel_count(x, axes)]) for part in (dy, x))
        return tf.reshape(_COMPILED_AFFINE_INPUT_GRADIENT[x.dtype](*rows, *vectors), x.shape)

    return with_recomputed_gradient(axes, plain, kernel)


def _affine_input_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    slope: tf.Tensor,
    offset: tf.Tensor,
) -> tf.Tensor:
    wide_dy, wide_x = tf.cast(dy, scale.dtype), tf.cast(x, mean.dtype)
    return tf.cast(wide_dy * scale - ((wide_x - mean) * slope + offset), x.dtype)


# Each is traced once; XLA compiles it for each shape at first use.
_COMPILED_AFFINE_INPUT_GRADIENT = {
    dtype: tf.function(
        _affine_input_gradient,
        jit_compile=True,
        autograph=False,
        input_signature=[tf.TensorSpec([None, None], dtype)] * 2 + [tf.TensorSpec([None])] * 4,
    )
    for dtype in (tf.float32, tf.bfloat16, tf.float16)
}


def _unit_variance(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    return tf.fill([channel_count(x, axes)], _UNIT_VARIANCE)


def fused_forward(
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    epsilon: float,
    axes: Sequence[int],
    moments: Sequence[tf.Tensor] = (),
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Runs TensorFlow's fused batch norm: in its training form, unless it is given ``moments``.

    Returns:
        The outputs, shape and dtype of ``x``, and the mean and the unbiased variance that it took.
    """
    mean, variance = moments or (tf.zeros([0]), tf.zeros([0]))
    with xla.kept_out_of(x):
        outputs = tf.raw_ops.FusedBatchNormV3(
            x=_as_rows(x, axes),
            scale=scale,
            offset=offset,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            is_training=not moments,
        )
    return _shaped_like(x, outputs.y), outputs.batch_mean, outputs.batch_variance


def fused_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    scale: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
    axes: Sequence[int],
    training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Runs the kernel of its gradient, in one of the two forms, with the moments of the forward.

    Returns:
        The gradients for ``x``, ``scale`` and the offset.
    """
    # This is only called on CPUs, where the second reserve is the variance in both forms.
    with xla.kept_out_of(x):
        outputs = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=_as_rows(dy, axes),
            x=_as_rows(x, axes),
            scale=scale,
            reserve_space_1=mean,
            reserve_space_2=variance,
            reserve_space_3=tf.zeros([0]),
            epsilon=epsilon,
            is_training=training,
        )
    dx = _shaped_like(x, outputs.x_backprop)
    return dx, outputs.scale_backprop, outputs.offset_backprop


def _as_rows(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns ``x`` as the fused kernels take it: ``(rows, 1, 1, channels)``."""
    # In float16 the kernels are slower than a cast and float32; in bfloat16 they are faster.
    if x.dtype == tf.float16:
        x = tf.cast(x, tf.float32)
    # A reshape copies nothing.
    return tf.reshape(x, [-1, 1, 1, channel_count(x, axes)])


def _shaped_like(x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Returns a kernel's result for `_as_rows` in the shape and dtype of ``x``."""
    return tf.cast(tf.reshape(rows, tf.shape(x, tf.int64)), x.dtype)
