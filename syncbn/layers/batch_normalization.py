"""Batch normalization with the statistics of all replicas."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn import keras_api
from syncbn.communicators.base import Communicator
from syncbn.layers.synchronized import SynchronizedLayer
from syncbn.ops.channels import channel_count, statistics_dtype
from syncbn.ops.moments import Moments
from syncbn.ops.synchronized import AllReduceSum, batch_normalize


@keras_api.register_keras_serializable(package="syncbn")
class SyncBatchNormalization(SynchronizedLayer, keras_api.keras.layers.BatchNormalization):
    r"""Batch normalization with the statistics of the whole batch, over all replicas.

    In training

    $$y = \gamma \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} + \beta$$

    where mean and (biased) variance are those of all elements of a channel on all replicas: W
    replicas with batches x1 ... xW behave as one with the concatenated batch, however it is split.
    Replicas may have batches of different sizes, also empty ones, and masks. At inference, and when
    ``trainable`` is false, the layer is `tf.keras.layers.BatchNormalization`: it uses the moving
    statistics and communicates with nobody.

    Each training call costs one all-reduce of ``2 * channels + 1`` float64 numbers, and its
    gradient one of ``2 * channels``.

    Warning: every replica has to make every training call. A worker that skips the layer, or runs
    out of batches before the others do, leaves them waiting.

    Args:
        axis: The axis (or, in Keras 2, axes) that is normalized, typically that of the features.
        momentum: Of the moving averages, in [0, 1]. ``None`` for the cumulative average, in which
            every batch weighs as many elements as it has (it adds a weight, ``moving_count``).
        epsilon: Added to the variance; not negative.
        center: Whether to add ``beta``.
        scale: Whether to multiply by ``gamma``.
        communicator: What joins the replicas: ``"auto"`` (see `syncbn.resolve`),
            ``"tf.distribute"``, ``"horovod"``, ``"mpi"``, ``"local"``, or a `syncbn.Communicator`,
            of which a saved or cloned layer keeps the name only.
        unbiased_moving_variance: Whether the moving variance collects ``N / (N - 1)`` times the
            biased variance, N being the elements per channel on all replicas. The outputs do not
            change.
        **kwargs: The other arguments of `tf.keras.layers.BatchNormalization`: initializers,
            regularizers, constraints, and those of any layer. ``renorm`` and
            ``virtual_batch_size`` are not supported.

    Raises:
        ValueError: an argument outside of its range, or one that is not supported.
        TypeError: several axes in Keras 3, or a ``communicator`` that is none.

    Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift" (2015); synchronized: Peng et al., "MegDet" (2018).
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *,
        communicator: str | Communicator = "auto",
        unbiased_moving_variance: bool = False,
        synchronized: bool = True,
        renorm: bool = False,
        virtual_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not epsilon >= 0:  # a NaN too
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon}.")
        if not synchronized:
            raise ValueError(
                "SyncBatchNormalization is always synchronized. Received: synchronized=False. Use "
                "communicator='local' for the statistics of each replica alone."
            )
        if renorm or virtual_batch_size is not None:
            raise ValueError(
                "SyncBatchNormalization supports neither batch renormalization nor virtual "
                f"batches. Received: renorm={renorm}, virtual_batch_size={virtual_batch_size}. "
                "Leave them out, or use tf.keras.layers.BatchNormalization."
            )
        if not isinstance(axis, Sequence):
            axis = operator.index(axis)
        elif keras_api.KERAS_3:
            raise TypeError(
                f"Keras 3 normalizes one axis. Received: axis={axis}. Give an integer, or use "
                "Keras 2 (TF_USE_LEGACY_KERAS=1), which takes several."
            )
        super().__init__(
            momentum,
            communicator,
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            # Keeps Keras 2 from choosing its fused kernels, which this layer does not call.
            synchronized=True,
            **kwargs,
        )
        self.unbiased_moving_variance = unbiased_moving_variance

    def build(self, input_shape: Any) -> None:
        self._check_input_shape(input_shape)
        super().build(input_shape)
        self._build_count(self.moving_mean.shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["unbiased_moving_variance"] = self.unbiased_moving_variance
        return _without_host_synchronization(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """Makes a layer from its own config, or from that of a plain `BatchNormalization`."""
        return super().from_config(_without_host_synchronization(config))

    def _statistics(self) -> tuple[Any, ...]:
        return self.moving_mean, self.moving_variance

    def _call_training(
        self,
        inputs: tf.Tensor,
        axes: tuple[int, ...],
        mask: tf.Tensor | None,
        all_reduce_sum: AllReduceSum,
    ) -> tuple[tf.Tensor, ...]:
        channels, dtype = channel_count(inputs, axes), statistics_dtype(inputs.dtype)
        gamma = _channel_vector(self.gamma) if self.scale else tf.ones([channels], dtype)
        beta = _channel_vector(self.beta) if self.center else tf.zeros([channels], dtype)
        outputs, moments = batch_normalize(
            inputs,
            gamma,
            beta,
            axes=axes,
            epsilon=self.epsilon,
            all_reduce_sum=all_reduce_sum,
            mask=mask,
        )
        variance = moments.variance
        if self.unbiased_moving_variance:
            variance = _unbiased(moments)
        return outputs, moments.count, moments.mean, variance

    def _call_inference(self, inputs: tf.Tensor, mask: Any) -> tf.Tensor:
        return keras_api.keras.layers.BatchNormalization.call(
            self, inputs, training=False, mask=mask
        )


def _channel_vector(weight: Any) -> tf.Tensor:
    # Keras 2 gives the weights of several axes the rank of the input.
    return tf.reshape(tf.convert_to_tensor(weight), [-1])


def _unbiased(moments: Moments) -> tf.Tensor:
    # Bessel's correction. A single element has variance zero, and keeps it.
    correction = moments.count / tf.maximum(moments.count - 1.0, 1.0)
    return moments.variance * tf.cast(correction, moments.variance.dtype)


def _without_host_synchronization(config: dict[str, Any]) -> dict[str, Any]:
    # The host's flag for its own way to synchronize says nothing about this layer.
    return {key: value for key, value in config.items() if key != "synchronized"}
