"""Batch normalization over all replicas, with an exact custom gradient.

One collective in the forward and one in the backward pass. A replica with an empty batch takes part
too: without it, the others would wait for ever.

Between the passes only the input, in its own dtype, and channel vectors are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.ops.channels import statistics_dtype
from syncbn._src.ops.differentiation import (
    compiled,
    in_current_graph,
    kept,
    of_shape,
    with_recomputed_gradient,
)
from syncbn._src.ops.kernels import (
    PLAIN,
    Kernels,
    choose_kernels,
    fused_gradient,
    gradient_sums,
    input_gradient,
    scale_and_offset,
)
from syncbn._src.ops.moments import (
    Moments,
    Sums,
    count_elements,
    cut_off,
    exact_sums,
    is_reliable,
    local_sums,
    moments_of,
    rounded,
    unbiased,
    widened,
)
from syncbn._src.ops.replicas import Replicas
from syncbn._src.ops.shared_traces import shared
from syncbn._src.ops.training_kernels import normalize_single_replica

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
        mask: From `expand_mask`. The statistics leave out elements where it is false; all of ``x``
            is normalized.
        correction: That of batch renormalization.
        bessel: Whether to return the unbiased variance.

    Returns:
        ``y``, in the shape and dtype of ``x``, and the moments for the moving statistics, in
        float64 and with the gradient stopped.

        The gradient is that of the loss summed over the replicas with respect to this replica's
        ``x``, and this replica's own contribution to those of ``gamma`` and ``beta``.
    """
    dtype = statistics_dtype(x.dtype)
    # A single replica's passes can be one kernel each.
    plainly = mask is None and correction is None and _is_positive(epsilon, dtype)
    at_once = replicas.alone and plainly
    kernels = choose_kernels(x, axes, masked=mask is not None, at_once=at_once)
    x, gamma, beta = (
        in_current_graph(x),
        in_current_graph(tf.cast(gamma, dtype)),
        in_current_graph(tf.cast(beta, dtype)),
    )
    normalization = _Normalization(tuple(axes), epsilon, kernels, mask is not None)
    # The moments are not among its results: a tape would create zeros for their gradients.
    taken_up: list[Moments] = []
    if at_once and (kernels.fused or kernels.compiled):
        normalize = _normalize_single_replica(normalization, bessel, taken_up.append)
    else:
        normalize = _normalize(normalization, replicas, mask, correction, bessel, taken_up.append)
    y = tf.custom_gradient(normalize)(x, gamma, beta)
    return y, cut_off(taken_up[0])


class _Factors(NamedTuple):
    """Channel vectors in the dtype of statistics, except the count."""

    count: tf.Tensor
    mean: tf.Tensor
    rest: tf.Tensor
    """What rounding the mean has left out (see `rounded`)."""
    inverse_deviation: tf.Tensor
    scale: tf.Tensor
    offset: tf.Tensor
    r: tf.Tensor | None = None
    """Of batch renormalization, like ``d``."""
    d: tf.Tensor | None = None

    def tensors(self) -> list[tf.Tensor]:
        return [part for part in self if part is not None]


class _Normalization(NamedTuple):
    """Normalization with given moments, and its gradient: the part without communication."""

    axes: tuple[int, ...]
    epsilon: float
    kernels: Kernels
    masked: bool

    def outputs(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *rest: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """Returns y, and the factors.

        ``rest``: the batch's count, mean and variance, and r and d of batch renormalization.
        """
        by = self.factors(gamma, beta, *rest)
        offset = by.offset - by.rest * by.scale
        y = scale_and_offset(x, by.mean, by.scale, offset, self.axes, self.kernels.fused)
        return y, *by.tensors()

    def factors(
        self,
        gamma: tf.Tensor,
        beta: tf.Tensor,
        count: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        *renorm: tf.Tensor,
    ) -> _Factors:
        """Returns the channel vectors that follow from the batch's moments."""
        mean, rest = rounded(mean, gamma.dtype)
        inverse_deviation = _inverse_deviation(tf.cast(variance, gamma.dtype), self.epsilon)
        scale, offset = gamma * inverse_deviation, beta
        if renorm:
            r, d = renorm
            scale, offset = scale * r, beta + gamma * d
        return _Factors(count, mean, rest, inverse_deviation, scale, offset, *renorm)

    @property
    def keeps_scaled(self) -> bool:
        """Whether `input_gradient` takes ``dy * scale`` from the kernel of `gradient_sums`.

        Where no kernel computes it with the sums, it is not kept during the collective.
        """
        return self.kernels.fused and not (self.kernels.compiled_gradient or self.masked)

    # With x^ the normalized input, n the count over all replicas, and both sums over all replicas:
    #     dx = gamma r / sigma * (dy - sum(dy) / n - x^ * sum(dy * x^) / n).
    # The sums include masked elements, which are normalized too; the two corrections apply only to
    # the elements that the statistics were computed from.

    def gradient_sums(self, dy: tf.Tensor, x: tf.Tensor, *rest: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Returns this replica's two sums, dgamma, dbeta, and what else `input_gradient` takes.

        ``rest``: the factors, and the mask.
        """
        by, mask = self._parted(rest)
        first, centered, scaled = gradient_sums(
            dy, x, by.mean, by.scale, self.axes, self.kernels, mask
        )
        centered -= tf.cast(by.rest, first.dtype) * first
        dbeta, dgamma = (tf.cast(part, by.scale.dtype) for part in (first, centered))
        dgamma *= by.inverse_deviation
        if by.r is not None:
            dgamma = by.r * dgamma + by.d * dbeta
        own = tf.concat([first, centered], 0), dgamma, dbeta
        return (*own, scaled) if self.keeps_scaled else own

    def input_gradient(
        self, dy: tf.Tensor, x: tf.Tensor, total: tf.Tensor, *rest: tf.Tensor
    ) -> tf.Tensor:
        """Returns dx, given the sums over all replicas.

        ``rest``: what `gradient_sums` returns for this, and its own ``rest``.
        """
        scaled, *others = rest if self.keeps_scaled else (None, *rest)
        by, mask = self._parted(others)
        sums = tf.split(total, 2)
        means = (tf.math.divide_no_nan(part, by.count) for part in sums)
        mean_dy, mean_dy_x = (tf.cast(part, by.scale.dtype) for part in means)
        # In this order: the cube of the inverse of a small deviation overflows float32.
        slope = by.scale * (by.inverse_deviation * (by.inverse_deviation * mean_dy_x))
        offset = by.scale * mean_dy - by.rest * slope
        return input_gradient(
            dy, x, by.mean, by.scale, scaled, slope, offset, self.axes, self.kernels, mask
        )

    def _parted(self, rest: Sequence[tf.Tensor]) -> tuple[_Factors, tf.Tensor | None]:
        *factors, mask = rest if self.masked else (*rest, None)
        return _Factors(*factors), mask


class _Pieces(NamedTuple):
    """The operations between the collectives: those of `_Normalization`, or compiled ones."""

    sums: Callable[..., Sums]
    outputs: Callable[..., tuple[tf.Tensor, ...]]
    gradient_sums: Callable[..., tuple[tf.Tensor, ...]]
    input_gradient: Callable[..., tf.Tensor]


@functools.cache
def _pieces(normalization: _Normalization) -> _Pieces:
    axes, kernels = normalization.axes, normalization.kernels
    piece = functools.partial(compiled, axes=axes) if kernels.compiled else shared
    own = normalization._replace(kernels=PLAIN) if kernels.compiled else normalization

    def sums(x: tf.Tensor, *mask: tf.Tensor) -> Sums:
        return local_sums(x, axes, *mask)

    # For XLA, `local_sums` is a compiled piece already.
    all_sums = sums if kernels.compiled else shared(sums)
    return _Pieces(
        all_sums, piece(own.outputs), piece(own.gradient_sums), piece(own.input_gradient)
    )


_Normalize = Callable[..., tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, ...]]]]
"""Takes x, gamma and beta; returns the outputs and their gradient, for `tf.custom_gradient`."""


def _normalize(
    normalization: _Normalization,
    replicas: Replicas,
    mask: tf.Tensor | None,
    correction: Correction | None,
    bessel: bool,
    take_up: Callable[[Moments], None],
) -> _Normalize:
    """Returns the function to differentiate; it gives `take_up` the moving statistics' moments."""
    pieces = _pieces(normalization)
    masks = [] if mask is None else [mask]

    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        merged, taken_up = replicas.merge(pieces.sums(x, *masks), bessel)
        take_up(taken_up)
        renorm: Sequence[tf.Tensor] = ()
        if correction is not None:
            mean, variance = (tf.cast(part, gamma.dtype) for part in merged[1:])
            renorm = [tf.stop_gradient(part) for part in correction(mean, variance)]
        y, *factors = pieces.outputs(x, gamma, beta, *merged, *renorm)
        y.set_shape(x.shape)  # which a compiled piece does not know
        rest = [*factors, *masks]

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            dy, (x_, *others) = of_shape(dy, x.shape), kept((x, *rest))
            sums, dgamma, dbeta, *scaled = pieces.gradient_sums(dy, x_, *others)
            total = replicas.all_reduce_sum(sums, "gradient")
            dx = pieces.input_gradient(dy, x_, total, *scaled, *others)
            dx.set_shape(x.shape)
            return dx, dgamma, dbeta

        return y, gradient

    return normalize


def _normalize_single_replica(
    normalization: _Normalization, bessel: bool, take_up: Callable[[Moments], None]
) -> _Normalize:
    """Returns the same for a single replica: no collective within a pass."""
    kernels = _single_replica_kernels(normalization)

    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y, mean, variance, reliable = kernels.forward(x, gamma, beta)
        y.set_shape(x.shape)
        own = Moments(count_elements(x, normalization.axes), mean, variance)
        take_up(unbiased(own) if bessel else own)

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            tensors = kept((x, gamma, beta, mean, variance, reliable))
            dx, *others = kernels.backward(of_shape(dy, x.shape), *tensors)
            dx.set_shape(x.shape)
            return dx, *others

        return y, gradient

    return normalize


class _SingleReplicaKernels(NamedTuple):
    """The passes of a single replica, each in one kernel where that is reliable."""

    forward: Callable[..., tuple[tf.Tensor, ...]]
    """Returns the outputs, mean and variance, float64, and whether the kernel was reliable, for x,
    gamma and beta."""
    backward: Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
    """Returns dx, dgamma and dbeta for dy and all of the above but the outputs."""


@functools.cache
def _single_replica_kernels(normalization: _Normalization) -> _SingleReplicaKernels:
    axes, epsilon = normalization.axes, normalization.epsilon
    plain = normalization._replace(kernels=PLAIN)

    def outputs(
        by: _Normalization, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        count = count_elements(x, axes)
        own = moments_of(Sums(count, *exact_sums(x, count, axes, None)))
        return by.outputs(x, gamma, beta, *own)[0], own.mean, own.variance

    def gradients(
        by: _Normalization, dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        gamma, beta, mean, variance = vectors
        factors = by.factors(gamma, beta, count_elements(x, axes), mean, variance).tensors()
        sums, dgamma, dbeta, *scaled = by.gradient_sums(dy, x, *factors)
        return by.input_gradient(dy, x, sums, *scaled, *factors), dgamma, dbeta

    def forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return *outputs(plain, x, gamma, beta), tf.constant(True)

    def checked_forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rough_y, *rest = normalize_single_replica(x, gamma, beta, epsilon, axes)
        rough = Moments(count_elements(x, axes), *rest)
        reliable = is_reliable(rough)
        taken = tf.cond(
            reliable,
            lambda: (rough_y, *widened(rough)[1:]),
            lambda: outputs(normalization, x, gamma, beta),
        )
        return *taken, reliable

    def backward(
        dy: tf.Tensor, x: tf.Tensor, *rest: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        *vectors, _ = rest
        return gradients(plain, dy, x, *vectors)

    def checked_backward(
        dy: tf.Tensor, x: tf.Tensor, *rest: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        *vectors, reliable = rest
        gamma, _, *moments = vectors
        mean, variance = (tf.cast(moment, gamma.dtype) for moment in moments)
        return tf.cond(
            reliable,
            lambda: fused_gradient(dy, x, gamma, mean, variance, epsilon, axes, training=True),
            lambda: gradients(normalization, dy, x, *vectors),
        )

    if normalization.kernels.compiled:
        return _SingleReplicaKernels(compiled(forward, axes), compiled(backward, axes))
    return _SingleReplicaKernels(
        shared(with_recomputed_gradient(axes, forward, checked_forward)),
        shared(with_recomputed_gradient(axes, backward, checked_backward)),
    )


def _inverse_deviation(variance: tf.Tensor, epsilon: float) -> tf.Tensor:
    if _is_positive(epsilon, variance.dtype):
        return tf.math.rsqrt(variance + epsilon)
    # Zero where the divisor is zero, so that no NaN arises.
    return tf.math.divide_no_nan(tf.ones([], variance.dtype), tf.sqrt(variance + epsilon))


def _is_positive(epsilon: float, dtype: tf.DType) -> bool:
    return epsilon >= np.finfo(dtype.as_numpy_dtype).tiny
