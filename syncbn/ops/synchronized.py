"""Batch normalization and centering over all replicas, each with an exact custom gradient.

Each makes one collective in the forward and one in the backward pass; every replica does, an empty
one too, since a missing replica would leave the others waiting.

Between the passes only the input, in its own dtype, and channel vectors are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn.ops.channels import broadcast, statistics_dtype, sum_to_channels, where
from syncbn.ops.differentiation import kept, local, of_shape, with_recomputed_gradient
from syncbn.ops.kernels import Kernels, choose, gradient_sums, input_gradient, scale_and_offset
from syncbn.ops.moments import (
    Moments,
    Sums,
    checked_sums,
    count_elements,
    exact_sums,
    first_sums,
    local_sums,
    rounded,
)
from syncbn.ops.replicas import Replicas
from syncbn.ops.training_kernels import gradient_alone, normalize_alone

Correction = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""Returns ``r`` and ``d`` of batch renormalization for a mean and a variance."""


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    replicas: Replicas,
    mask: tf.Tensor | None = None,
    correction: Correction | None = None,
    bessel: bool = False,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes ``x`` with the statistics of all replicas.

    ``y = gamma * (r * (x - mean) / sqrt(variance + epsilon) + d) + beta``, with ``r = 1`` and
    ``d = 0`` (Ioffe & Szegedy, 2015) or constants that `correction` gives (Ioffe, 2017).

    Args:
        x: The input; floating, rank 2 at least.
        gamma: ``(channels,)``.
        beta: ``(channels,)``.
        axes: The normalized axes, sorted and non-negative.
        epsilon: Added to the variance.
        replicas: The replicas to normalize with.
        mask: From `expand_mask`. It chooses what the statistics are taken of; the whole of ``x`` is
            normalized with them.
        correction: Of batch renormalization.
        bessel: Whether the variance that is returned is the unbiased one.

    Returns:
        ``y``, shape and dtype of ``x``, and the moments that the moving statistics take up, in
        float32 at least and cut off from the gradient.

        The gradient is that of the loss summed over the replicas with respect to this replica's
        ``x``, and this replica's own share in those of ``gamma`` and ``beta``.
    """
    dtype = statistics_dtype(x.dtype)
    kernels = choose(x, axes, masked=mask is not None)
    x, gamma, beta = local(x), local(tf.cast(gamma, dtype)), local(tf.cast(beta, dtype))
    normalization = _Normalization(axes, epsilon, kernels, mask, correction)
    if (
        replicas.alone
        and kernels.fused
        and mask is None
        and correction is None
        and _is_positive(epsilon, dtype)
    ):
        normalize = _normalize_alone(normalization, replicas, bessel)
    else:
        normalize = _normalize(normalization, replicas, bessel)
    y, *taken_up = tf.custom_gradient(normalize)(x, gamma, beta)
    return y, _cut_off(dtype, *taken_up)


class _Normalization(NamedTuple):
    """How to normalize with given moments, and its gradient."""

    axes: Sequence[int]
    epsilon: float
    kernels: Kernels
    mask: tf.Tensor | None
    correction: Correction | None

    def prepared(self, moments: Moments, gamma: tf.Tensor, beta: tf.Tensor) -> _Factors:
        """Returns the channel vectors that the batch's moments make."""
        mean, rest = rounded(moments.mean, gamma.dtype)
        variance = tf.cast(moments.variance, gamma.dtype)
        inverse_deviation = _inverse_deviation(variance, self.epsilon)
        scale, offset, r, d = gamma * inverse_deviation, beta, None, None
        if self.correction is not None:
            r, d = map(tf.stop_gradient, self.correction(mean, variance))
            scale, offset = scale * r, beta + gamma * d
        return _Factors(moments.count, mean, rest, inverse_deviation, scale, offset, r, d)

    def outputs(self, x: tf.Tensor, by: _Factors) -> tf.Tensor:
        offset = by.offset - by.rest * by.scale
        return scale_and_offset(x, by.mean, by.scale, offset, self.axes, self.kernels.fused)

    def gradients(
        self, dy: tf.Tensor, x: tf.Tensor, by: _Factors, replicas: Replicas
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns dx, dgamma and dbeta."""
        # With x^ the normalized input, n the count over all replicas, and both sums over all
        # replicas:  dx = gamma r / sigma * (dy - sum(dy) / n - x^ * sum(dy * x^) / n).
        # The sums run over masked elements too, which also were normalized with the
        # statistics; the two corrections go to the elements that made the statistics.
        dtype = by.scale.dtype
        (first, centered), scaled = gradient_sums(
            dy, x, by.mean, by.scale, self.axes, self.kernels, self.mask
        )
        sums = tf.stack([first, centered - tf.cast(by.rest, first.dtype) * first])
        dbeta, dgamma = tf.unstack(tf.cast(sums, dtype))
        dgamma *= by.inverse_deviation
        if self.correction is not None:
            dgamma = by.r * dgamma + by.d * dbeta
        total = replicas.all_reduce_sum(sums, "gradient")
        means = tf.cast(tf.math.divide_no_nan(total, by.count), dtype)
        mean_dy, mean_dy_x = tf.unstack(means)
        # In this order: the cube of a small deviation's inverse is beyond float32.
        slope = by.scale * (by.inverse_deviation * (by.inverse_deviation * mean_dy_x))
        offset = by.scale * mean_dy - by.rest * slope
        dx = input_gradient(
            dy, x, by.mean, by.scale, scaled, slope, offset, self.axes, self.kernels, self.mask
        )
        return dx, dgamma, dbeta


class _Factors(NamedTuple):
    """Channel vectors of the dtype of statistics, but for the count."""

    count: tf.Tensor
    mean: tf.Tensor
    rest: tf.Tensor
    """What is to be added to the mean, which is rounded."""
    inverse_deviation: tf.Tensor
    scale: tf.Tensor
    offset: tf.Tensor
    r: tf.Tensor | None
    d: tf.Tensor | None


def _normalize(
    normalization: _Normalization, replicas: Replicas, bessel: bool
) -> Callable[..., tuple[Any, Callable]]:
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Callable]:
        sums = local_sums(x, normalization.axes, normalization.mask)
        merged, taken_up = replicas.merge(sums, bessel)
        factors = normalization.prepared(merged, gamma, beta)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            how, *tensors = kept((normalization, x, factors))
            return how.gradients(of_shape(dy, x.shape), *tensors, replicas)

        return (normalization.outputs(x, factors), *taken_up), gradient

    return normalize


def _normalize_alone(
    normalization: _Normalization, replicas: Replicas, bessel: bool
) -> Callable[..., tuple[Any, Callable]]:
    """Is `_normalize` for a single replica: no collective between the passes."""
    axes = tuple(normalization.axes)
    kernels = _kernels_alone(axes, normalization.epsilon, normalization.kernels)

    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[Any, Callable]:
        y, first, second, reliable = kernels.forward(x, gamma, beta)
        count = count_elements(x, axes)
        _, taken_up = replicas.merge(Sums(count, first, second), bessel)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            tensors = kept((x, gamma, beta, first, second, reliable))
            return kernels.backward(of_shape(dy, x.shape), *tensors)

        return (y, *taken_up), gradient

    return normalize


class _KernelsAlone(NamedTuple):
    """The passes of a single replica, by kernels for the whole of one where these are reliable."""

    forward: Callable[..., tuple[tf.Tensor, ...]]
    """Returns the outputs, the sums of the elements and of their squares, and whether the kernel
    was reliable, for x, gamma and beta."""
    backward: Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
    """Returns dx, dgamma and dbeta for dy and all of these but the outputs."""


@functools.cache
def _kernels_alone(axes: tuple[int, ...], epsilon: float, kernels: Kernels) -> _KernelsAlone:
    alone = Replicas(lambda tensor, name: tensor, alone=True)
    rounding = _Normalization(axes, epsilon, kernels, None, None)
    plain = rounding._replace(kernels=Kernels(fused=False, compiled=False))

    def factors(
        x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[Moments, _Factors]:
        moments, _ = alone.merge(Sums(count_elements(x, axes), *sums))
        return moments, plain.prepared(moments, gamma, beta)

    def forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        sums = exact_sums(x, count_elements(x, axes), axes, None)
        return plain.outputs(x, factors(x, gamma, beta, *sums)[1]), *sums, tf.constant(True)

    def checked_forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rough_y, *rough = normalize_alone(x, gamma, beta, epsilon, axes)
        *sums, reliable = checked_sums(x, Moments(count_elements(x, axes), *rough), axes)

        def outputs() -> tf.Tensor:
            return rounding.outputs(x, factors(x, gamma, beta, *sums)[1])

        return tf.cond(reliable, lambda: rough_y, outputs), *sums, reliable

    def backward(
        dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return plain.gradients(dy, x, factors(x, gamma, beta, *sums[:2])[1], alone)

    def checked_backward(
        dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *checked: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        *sums, reliable = checked
        moments, by = factors(x, gamma, beta, *sums)
        variance = tf.cast(moments.variance, gamma.dtype)
        return tf.cond(
            reliable,
            lambda: gradient_alone(dy, x, gamma, by.mean, variance, epsilon, axes),
            lambda: rounding.gradients(dy, x, by, alone),
        )

    return _KernelsAlone(
        with_recomputed_gradient(axes, forward, checked_forward),
        with_recomputed_gradient(axes, backward, checked_backward),
    )


def center(
    x: tf.Tensor, *, axes: Sequence[int], replicas: Replicas, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, Moments]:
    """Subtracts from ``x`` its mean over all replicas.

    Args:
        x: The input; floating, rank 2 at least.
        axes: The axes that keep a mean of their own each, sorted and non-negative.
        replicas: The replicas to take the mean over.
        mask: From `expand_mask`. It chooses what the mean is taken of; it is subtracted everywhere.

    Returns:
        ``x - mean``, shape and dtype of ``x``, and the moments that the moving mean takes up,
        without a variance, cut off from the gradient. The gradient is that of the loss summed over
        the replicas.
    """
    dtype = statistics_dtype(x.dtype)

    @tf.custom_gradient
    def subtract_mean(x: tf.Tensor) -> tuple[Any, Any]:
        merged, taken_up = replicas.merge(first_sums(x, axes, mask))
        mean, rest = rounded(merged.mean, dtype)
        y = _subtract(tuple(axes))(x, mean, rest)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
            x_, count, chosen = kept((x, merged.count, mask))
            wide_dy = tf.cast(of_shape(dy, x.shape), dtype)
            sum_dy = replicas.all_reduce_sum(sum_to_channels(wide_dy, axes), "gradient")
            mean_dy = tf.cast(tf.math.divide_no_nan(sum_dy, count), dtype)
            shift = tf.broadcast_to(broadcast(mean_dy, x_, axes), tf.shape(x_, tf.int64))
            return tf.cast(wide_dy - where(chosen, shift), x.dtype)

        return (y, taken_up.count, taken_up.mean), gradient

    y, *taken_up = subtract_mean(local(x))
    return y, _cut_off(dtype, *taken_up)


@functools.cache
def _subtract(axes: tuple[int, ...]) -> Callable[..., tf.Tensor]:
    def plain(x: tf.Tensor, *vectors: tf.Tensor) -> tf.Tensor:
        mean, rest = (broadcast(vector, x, axes) for vector in vectors)
        return tf.cast(tf.cast(x, mean.dtype) - mean - rest, x.dtype)

    return with_recomputed_gradient(axes, plain)


def _cut_off(
    dtype: tf.DType, count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor | None = None
) -> Moments:
    """Returns the moments in ``dtype``, without a gradient."""
    parts = count, tf.cast(mean, dtype), None if variance is None else tf.cast(variance, dtype)
    return Moments(*(None if part is None else tf.stop_gradient(part) for part in parts))


def _inverse_deviation(variance: tf.Tensor, epsilon: float) -> tf.Tensor:
    if _is_positive(epsilon, variance.dtype):
        return tf.math.rsqrt(variance + epsilon)
    # Zero where there is nothing to divide by: no NaN comes of it.
    return tf.math.divide_no_nan(tf.ones([], variance.dtype), tf.sqrt(variance + epsilon))


def _is_positive(epsilon: float, dtype: tf.DType) -> bool:
    return epsilon >= np.finfo(dtype.as_numpy_dtype).tiny
