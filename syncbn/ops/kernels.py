"""Which kernels to use where: plain operations, TensorFlow's fused batch norm, or compiled ones.

All give the same answer. TensorFlow's fused kernels read and write memory fewer times than plain
operations but cost more to start, and exist for float32 with the channels last only. Here they
stand for:

- the forward kernel in its inference form maps ``x`` to ``(x - mean) * scale + offset``;
- the gradient kernel in its inference form returns ``dy * scale`` and two sums over ``dy``;
- the forward kernel in its training form returns moments, with an error that is known;
- both in their training form are all that one replica alone needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn.ops.channels import broadcast, channel_count, sum_to_channels, where

# From how many elements on the fused kernels win, on CPUs. `benchmarks/kernels.py` prints the table
# that this comes from; docs/design.md shows it.
FUSED_FROM_ELEMENTS = 1 << 17

# Beyond, the kernels' float32 sums over all rows lose more than the fifth digit.
MOST_FUSED_ROWS = 1 << 17

# The fused kernels multiply by rsqrt(variance + epsilon). With these two that factor is exactly
# one, so the scale is ours alone.
_EPSILON = 2.0**-10
_UNIT_VARIANCE = 1.0 - _EPSILON


class Kernels(NamedTuple):
    """The kernels chosen for an input."""

    fused: bool
    """TensorFlow's fused batch norm, where it serves."""
    compiled: bool
    """One that XLA compiles, for the input's gradient."""


def choose(x: tf.Tensor, axes: Sequence[int], masked: bool = False) -> Kernels:
    """Returns the fastest kernels that serve ``x``, by its static shape."""
    # On GPUs nothing was measured. There plain operations serve any number of rows and are
    # deterministic where that is asked for; cuDNN's inference form is neither.
    if tf.config.get_visible_devices("GPU"):
        return Kernels(fused=False, compiled=False)
    if x.dtype == tf.float64 or tuple(axes) != (x.shape.rank - 1,):
        return Kernels(fused=False, compiled=False)
    # An unknown size, that of the batch mostly, counts as one.
    elements = math.prod(size or 1 for size in x.shape)
    fused = elements >= FUSED_FROM_ELEMENTS and elements <= MOST_FUSED_ROWS * x.shape[-1]
    # XLA compiles anew for each shape that comes; and a session's graph is no place for it.
    once = x.shape.is_fully_defined() and not tf.executing_eagerly()
    in_function = tf.compat.v1.executing_eagerly_outside_functions()
    return Kernels(fused, compiled=fused and once and in_function and not masked)


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

    def plain(x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        mean, scale, offset = (broadcast(vector, x, axes) for vector in vectors)
        return tf.cast((tf.cast(x, mean.dtype) - mean) * scale + offset, x.dtype)

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
        return tf.cast(tf.reshape(y, tf.shape(x)), x.dtype)

    return run(plain, (x, mean, scale, offset), kernel if fused else None)


class GradientSums(NamedTuple):
    """What replicas add up for the gradient of the input, float64 ``(channels,)`` each."""

    first: tf.Tensor
    """The sum of ``dy``."""
    centered: tf.Tensor
    """The sum of ``dy * (x - mean)``."""


def gradient_sums(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    axes: Sequence[int],
    kernels: Kernels,
    mask: tf.Tensor | None = None,
) -> tuple[GradientSums, tf.Tensor]:
    """Returns this replica's sums, and ``dy * scale``, which the kernel makes along with them.

    The latter has the dtype of ``dy`` if `kernels.compiled` and is of no use then, else that of
    ``scale``. ``mask`` only says that ``x`` may hold NaN or Inf where ``dy`` is zero.
    """
    if not kernels.compiled:  # with which nothing but the sums is taken from here
        dy, x = tf.cast(dy, scale.dtype), tf.cast(x, scale.dtype)

    def plain(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tuple[tf.Tensor, ...]:
        mean, scale = (broadcast(vector, x, axes) for vector in vectors)
        wide_dy, centered = tf.cast(dy, scale.dtype), tf.cast(x, mean.dtype) - mean
        # Zero times NaN is NaN: what a mask hides must not come back through a zero gradient.
        multiply = tf.multiply if mask is None else tf.math.multiply_no_nan
        sums = (sum_to_channels(part, axes) for part in (wide_dy, multiply(centered, wide_dy)))
        return *sums, tf.cast(wide_dy * scale, dy.dtype)

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
        sums = terms.offset_backprop, terms.scale_backprop
        scaled = tf.cast(tf.reshape(terms.x_backprop, tf.shape(dy)), dy.dtype)
        return *(tf.cast(part, tf.float64) for part in sums), scaled

    fused = kernels.fused and mask is None
    *sums, scaled = run(plain, (dy, x, mean, scale), kernel if fused else None)
    return GradientSums(*sums), scaled


def input_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    scaled: tf.Tensor,
    slope: tf.Tensor,
    offset: tf.Tensor,
    axes: Sequence[int],
    kernels: Kernels,
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns ``dy * scale - ((x - mean) * slope + offset)``, shape and dtype of ``x``.

    ``scaled`` is what `gradient_sums` has returned of the same. Where ``mask`` is false, the result
    is ``dy * scale``.
    """
    if kernels.compiled:

        def plain(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
            return _line(dy, x, *(broadcast(vector, x, axes) for vector in vectors))

        def kernel(dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
            rows = (tf.reshape(part, [-1, channel_count(x, axes)]) for part in (dy, x))
            return tf.reshape(_COMPILED_LINE[x.dtype](*rows, *vectors), x.shape)

        return run(plain, (dy, x, mean, scale, slope, offset), kernel)
    wide_x = tf.cast(where(mask, x), mean.dtype)
    shift = scale_and_offset(wide_x, mean, slope, offset, axes, kernels.fused)
    return tf.cast(scaled - where(mask, shift), x.dtype)


def _line(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    scale: tf.Tensor,
    slope: tf.Tensor,
    offset: tf.Tensor,
) -> tf.Tensor:
    wide_dy, wide_x = tf.cast(dy, scale.dtype), tf.cast(x, mean.dtype)
    return tf.cast(wide_dy * scale - ((wide_x - mean) * slope + offset), x.dtype)


# Traced once each; XLA compiles them for each shape when it comes.
_COMPILED_LINE = {
    dtype: tf.function(
        _line,
        jit_compile=True,
        autograph=False,
        input_signature=[tf.TensorSpec([None, None], dtype)] * 2 + [tf.TensorSpec([None])] * 4,
    )
    for dtype in (tf.float32, tf.bfloat16, tf.float16)
}


def rough_moments(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and biased variance of ``x`` by the fused kernel, ``(channels,)`` each.

    Two passes, but each adds up all rows in float32: after n of them the mean can be off by
    ``n * 2**-24`` of the mean magnitude, and the variance by the square of that. NaN for no rows.
    """

    def plain(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _plain_moments(tf.cast(x, tf.float32))

    def kernel(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        channels = channel_count(x, axes)
        # What is normalized goes no further than here, or an eager tape would keep it.
        return _training_form(x, tf.ones([channels]), tf.zeros([channels]), _EPSILON, axes)[1:]

    return run(plain, (x,), kernel)


def normalize_alone(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns ``x`` normalized with its own moments, and these: those of `rough_moments`."""

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

    return run(plain, (x, scale, offset), kernel)


def _training_form(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    outputs = tf.raw_ops.FusedBatchNormV3(
        x=_rows(x, axes),
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
    y = tf.cast(tf.reshape(outputs.y, tf.shape(x)), x.dtype)
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
        outputs = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=_rows(dy, axes),
            x=_rows(x, axes),
            scale=scale,
            reserve_space_1=mean,
            reserve_space_2=variance,
            reserve_space_3=tf.zeros([0]),
            epsilon=epsilon,
            is_training=True,
        )
        dx = tf.cast(tf.reshape(outputs.x_backprop, tf.shape(x)), x.dtype)
        return dx, outputs.scale_backprop, outputs.offset_backprop

    return run(plain, (dy, x, scale, mean, variance), kernel)


def run(plain: Callable, inputs: tuple[tf.Tensor, ...], kernel: Callable | None = None) -> Any:
    """Runs ``kernel``, or ``plain`` where there is none, and differentiates ``plain``.

    TensorFlow's own gradients of the fused kernels leave out what moments and means contribute,
    which only a second derivative asks for. And an eager tape would keep every tensor between the
    inputs and the outputs for that; instead ``plain`` is repeated when somebody asks.
    """
    if kernel is None and not tf.executing_eagerly():
        return plain(*inputs)

    @tf.custom_gradient
    def call(*inputs: tf.Tensor) -> tuple[Any, Callable]:
        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = tf.nest.flatten(plain(*inputs))
            return tape.gradient(outputs, inputs, upstream)

        # Without a gradient: eager tapes record what is custom, and also what it consists of. And
        # TensorFlow cannot differentiate a branch of `tf.cond` from outside of which compiled code
        # takes its inputs; these are inside.
        return (kernel or plain)(*map(tf.stop_gradient, inputs)), gradient

    return call(*inputs)


def _rows(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    # The kernels are slower in float16 than a cast and float32, in bfloat16 faster.
    if x.dtype == tf.float16:
        x = tf.cast(x, tf.float32)
    # They want four dimensions; a reshape copies nothing.
    return tf.reshape(x, [-1, 1, 1, channel_count(x, axes)])


def _plain_moments(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    # `tf.nn.moments` stops a gradient, and is wrong from the second derivative on.
    mean = tf.reduce_mean(x, _reduced(x))
    return mean, tf.reduce_mean(tf.square(x - mean), _reduced(x))


def _reduced(x: tf.Tensor) -> list[int]:
    return list(range(x.shape.rank - 1))
