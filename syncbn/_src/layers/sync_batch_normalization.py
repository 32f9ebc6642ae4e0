"""Batch normalization with the statistics of all replicas."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.groups import check_grouping
from syncbn._src.keras_compat import keras_api
from syncbn._src.layers.momentum import MomentumAttribute, momentum_of
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.ops.channels import channel_count, integer_axes, normalized_axes, statistics_dtype
from syncbn._src.ops.normalization import Correction, batch_normalize
from syncbn._src.ops.replicas import Replicas
from syncbn._src.ops.virtual import virtual_batch_normalize

_RENORM = ("renorm_mean", "renorm_stddev")


@keras_api.register_keras_serializable(package="syncbn")
class SyncBatchNormalization(SynchronizedLayer, keras_api.PLAIN_BATCH_NORMALIZATION):
    r"""Batch normalization with the statistics of the whole batch, over all replicas.

    In training

    $$y = \gamma \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} + \beta$$

    where mean and (biased) variance are those of all elements of a channel on all replicas: W
    replicas with batches x1 ... xW behave as one with the concatenated batch, however it is split.
    Replicas may have batches of different sizes, also empty ones, and masks. At inference, and when
    ``trainable`` is false, the layer is `tf.keras.layers.BatchNormalization`: it uses the moving
    statistics and does not communicate.

    Each training call costs one all-reduce of ``2 * channels + 1`` float64 numbers, and its
    gradient one of ``2 * channels``.

    Warning: every replica has to make every training call. A worker that skips the layer, or runs
    out of batches before the others do, leaves them waiting.

    Args:
        axis: The axis (or, in Keras 2, axes) that is normalized, typically that of the features.
        momentum: The momentum of the moving averages, in [0, 1]: a number, or a scalar variable of
            TensorFlow or Keras. A variable is read at each training call, so that a callback can
            assign to it, on all workers alike. It is not a weight of the layer, and a config has
            its current value. ``None`` for the cumulative average, in which each batch is weighted
            by its number of elements (it adds a weight, ``moving_count``).
        epsilon: Added to the variance; not negative.
        center: Whether to add ``beta``.
        scale: Whether to multiply by ``gamma``.
        communicator: The engine that joins the replicas: ``"auto"`` (see `syncbn.resolve`),
            ``"tf.distribute"``, ``"horovod"``, ``"mpi"``, ``"local"``, or a `syncbn.Communicator`,
            of which a saved or cloned layer keeps only the name. Horovod and MPI also join the
            replicas of a MirroredStrategy within each process.
        group_size: Share statistics among this many neighbouring replicas only (a divisor of the
            number of replicas), or among those of one machine: ``"node"``. The moving statistics
            follow the average over all groups, weighted by count. Over MPI and Horovod that costs
            one more collective of ``2 * channels + 1`` numbers forward; Horovod has to be
            initialized with ``process_sets="dynamic"``. With a single replica it has no effect.
        groups: The same, as the ranks of each group; every replica is in exactly one.
        target_batch: The same, with the group size that brings the samples of a group nearest to
            this many. The batch size must be known when the layer first trains.
        unbiased_moving_variance: Whether the moving variance averages the unbiased variance,
            ``N / (N - 1)`` times the biased one, N being the number of elements per channel on all
            replicas. The outputs do not change.
        renorm: Batch renormalization: the outputs are ``gamma * (r * x^ + d) + beta``, x^ being the
            normalized input, where r and d, constants for the gradient, make them what the
            statistics ``renorm_mean`` and ``renorm_stddev`` would have given. As in Keras; these
            two, and ``moving_stddev``, are additional weights. Not inside of `tf.recompute_grad`,
            which would find them already updated.
        renorm_clipping: Bounds for r and d: a dictionary of ``"rmin"``, ``"rmax"`` and ``"dmax"``.
        renorm_momentum: That of ``renorm_mean`` and ``renorm_stddev``; a number or a variable in
            [0, 1].
        virtual_batch_size: Normalize slices of each replica's batch, of at most this many samples,
            each with its own statistics (ghost batch normalization). With s slices, sample i is in
            slice ``i % s``. The moving statistics follow the average over all slices of all
            replicas: one all-reduce forward, none backward.
        **kwargs: The other arguments of `tf.keras.layers.BatchNormalization`: initializers,
            regularizers, constraints, and those of any layer.

    Raises:
        ValueError: an argument outside of its range, or one that is not supported.
        TypeError: an ``axis`` that is no integer, several in Keras 3, a ``communicator`` that is
            not one, a momentum that is neither a number nor a scalar variable.

    Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift" (2015); synchronized: Peng et al., "MegDet" (2018); renormalization:
    Ioffe, "Batch Renormalization" (2017); virtual batches: Hoffer, Hubara & Soudry, "Train longer,
    generalize better" (2017).

    Example:
        >>> layer = syncbn.SyncBatchNormalization(momentum=0.9)
        >>> inputs = tf.constant([[1.0], [3.0]])  # the mean over all replicas is 2
        >>> print(layer(inputs, training=True).numpy().round(2))
        [[-1.]
         [ 1.]]
        >>> print(layer.moving_mean.numpy().round(2))
        [0.2]
    """

    renorm_momentum = MomentumAttribute()

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: Any = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *,
        communicator: str | Communicator = "auto",
        group_size: int | str | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        target_batch: int | None = None,
        unbiased_moving_variance: bool = False,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | None] | None = None,
        renorm_momentum: Any = 0.99,
        virtual_batch_size: int | None = None,
        synchronized: bool = True,
        **kwargs: Any,
    ) -> None:
        if not epsilon >= 0:  # or NaN
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon}.")
        if not synchronized:
            raise ValueError(
                "SyncBatchNormalization is always synchronized. Received: synchronized=False. Use "
                "communicator='local' for the statistics of each replica alone."
            )
        if renorm and unbiased_moving_variance:
            raise ValueError(
                "Batch renormalization averages deviations, as Keras does, and those are biased. "
                "Received: renorm=True and unbiased_moving_variance=True. Use one."
            )
        if virtual_batch_size is not None:
            virtual_batch_size = at_least_one("virtual_batch_size", virtual_batch_size)
        grouping = check_grouping(group_size, groups, target_batch)
        if virtual_batch_size is not None and grouping.is_given():
            raise ValueError(
                "Groups normalize with more than a replica's batch, virtual batches with less. "
                f"Received: virtual_batch_size={virtual_batch_size} and {grouping}. Use one."
            )
        if renorm:
            keras_api.require_renorm()
            kwargs |= {"renorm": True, "renorm_clipping": _checked_clipping(renorm_clipping or {})}
        axis = integer_axes(axis)
        if isinstance(axis, list) and keras_api.KERAS_3:
            raise TypeError(
                f"Keras 3 normalizes one axis. Received: axis={axis}. Give an integer, or use "
                "Keras 2 (TF_USE_LEGACY_KERAS=1), which takes several."
            )
        super().__init__(
            momentum,
            communicator,
            grouping,
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            # Set below: here it would disable the fused kernels of Keras 2, also at inference.
            synchronized=False,
            **kwargs,
        )
        self.synchronized = True
        self.unbiased_moving_variance = unbiased_moving_variance
        self.renorm_momentum = renorm_momentum
        self.renorm = renorm  # a Keras 3 without renormalization has no such attribute
        # Not passed to Keras 2, which would give the weights two more dimensions.
        self._virtual_batch_size = virtual_batch_size

    def build(self, input_shape: Any) -> None:
        shape = self._check_input_shape(input_shape)
        if self._virtual_batch_size is not None and 0 in normalized_axes(self.axis, shape):
            raise ValueError(
                "Virtual batches are slices of axis 0, so that cannot be normalized. "
                f"Received: axis={self.axis}."
            )
        super().build(input_shape)
        self._build_count(self.moving_mean.shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["unbiased_moving_variance"] = self.unbiased_moving_variance
        config["virtual_batch_size"] = self._virtual_batch_size
        if "renorm_momentum" in config:
            config["renorm_momentum"] = momentum_of(self, "renorm_momentum").value()
        return _without_host_synchronization(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """Creates a layer from its own config, or from that of a plain `BatchNormalization`."""
        return super().from_config(_without_host_synchronization(config))

    def _statistics(self) -> tuple[str, ...]:
        # As in Keras, renormalization averages deviations; the variance is computed from them.
        return "moving_mean", "moving_stddev" if self.renorm else "moving_variance"

    def _moving(self) -> tuple[str, ...]:
        renorm = ("moving_variance", *_RENORM) if self.renorm else ()
        return (*super()._moving(), *renorm)

    def _counts_samples(self) -> bool:
        return super()._counts_samples() or self._virtual_batch_size is not None

    def _uses_moving_statistics(self) -> bool:
        return self.renorm

    def _call_training(
        self,
        inputs: tf.Tensor,
        axes: tuple[int, ...],
        mask: tf.Tensor | None,
        replicas: Replicas,
        before: Mapping[str, tf.Tensor],
    ) -> tuple[tf.Tensor, ...]:
        channels, dtype = channel_count(inputs, axes), statistics_dtype(inputs.dtype)
        gamma = _channel_vector(self.gamma, dtype) if self.scale else tf.ones([channels], dtype)
        beta = _channel_vector(self.beta, dtype) if self.center else tf.zeros([channels], dtype)
        normalize = batch_normalize
        if self._virtual_batch_size is not None:
            normalize = functools.partial(virtual_batch_normalize, size=self._virtual_batch_size)
        outputs, moments = normalize(
            inputs,
            gamma,
            beta,
            axes=axes,
            epsilon=self.epsilon,
            replicas=replicas,
            mask=mask,
            correction=self._renorm_correction(before, dtype) if self.renorm else None,
            bessel=self.unbiased_moving_variance,
        )
        count, mean, variance = moments
        return outputs, count, mean, tf.sqrt(variance + self.epsilon) if self.renorm else variance

    def _renorm_correction(self, before: Mapping[str, tf.Tensor], dtype: tf.DType) -> Correction:
        """Returns the function that gives r and d (Ioffe, 2017), with Keras' safeguards."""
        renorm_mean, renorm_stddev = (_channel_vector(before[name], dtype) for name in _RENORM)
        # Small deviations early in training must not blow up the quotients.
        renorm_stddev = tf.maximum(renorm_stddev, self.epsilon**0.5)
        clipping = self.renorm_clipping

        def correction(mean: tf.Tensor, variance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # Deviations can be zero with epsilon=0 only; they give no NaN.
            r = tf.math.divide_no_nan(tf.sqrt(variance + self.epsilon), renorm_stddev)
            d = tf.math.divide_no_nan(mean - renorm_mean, renorm_stddev)
            r = tf.clip_by_value(r, clipping.get("rmin", 0.0), clipping.get("rmax", dtype.max))
            dmax = clipping.get("dmax", dtype.max)
            return r, tf.clip_by_value(d, -dmax, dmax)

        return correction

    def _move(
        self, before: Mapping[str, tf.Tensor], count: tf.Tensor, *targets: tf.Tensor
    ) -> list[tf.Tensor]:
        moved = super()._move(before, count, *targets)
        if self.renorm:
            variance = tf.nn.relu(tf.square(moved[1]) - self.epsilon)
            variance = tf.where(count > 0, variance, before["moving_variance"])
            self.update_statistic(self.moving_variance, variance)
            rate = momentum_of(self, "renorm_momentum").rate()
            self._move_towards(before, _RENORM, targets, count, rate)
        return moved

    def _call_inference(self, inputs: tf.Tensor) -> tf.Tensor:
        return keras_api.PLAIN_BATCH_NORMALIZATION.call(self, inputs, training=False)


keras_api.pass_on_configs(SyncBatchNormalization)


def _checked_clipping(given: Mapping[str, float | None]) -> dict[str, float]:
    clipping = {key: bound for key, bound in given.items() if bound is not None}
    r = clipping.get("rmin", 0.0), clipping.get("rmax", math.inf)
    known = set(clipping) <= {"rmin", "rmax", "dmax"}
    # Written so that NaN is refused too.
    if not (known and 0 <= r[0] <= r[1] and clipping.get("dmax", 0.0) >= 0):
        raise ValueError(
            "`renorm_clipping` must have no other keys than 'rmin', 'rmax' and 'dmax', and "
            f"0 <= rmin <= rmax, 0 <= dmax. Received: renorm_clipping={clipping}."
        )
    return clipping


def _channel_vector(weight: Any, dtype: tf.DType) -> tf.Tensor:
    vector = tf.cast(tf.convert_to_tensor(weight), dtype)
    # Keras 2 gives the weights of several axes the rank of the input.
    return vector if vector.shape.rank == 1 else tf.reshape(vector, [-1])


def _without_host_synchronization(config: dict[str, Any]) -> dict[str, Any]:
    # The flag of Keras' own synchronization says nothing about this layer.
    return {key: value for key, value in config.items() if key != "synchronized"}
