"""Centering: batch normalization's mean without its variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.groups import check_grouping
from syncbn._src.keras_compat import keras_api
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.ops.centering import center
from syncbn._src.ops.channels import broadcast_channels, integer_axes, normalized_axes
from syncbn._src.ops.replicas import Replicas


@keras_api.register_keras_serializable(package="syncbn")
class SyncCentering(SynchronizedLayer):
    r"""Subtracts the mean of each channel over all replicas, and keeps a moving average of it.

    In training $y = x - \mathrm{E}[x]$, where the mean is that of all elements of a channel on all
    replicas. At inference, and when ``trainable`` is false, the layer subtracts the moving average,
    a constant. The variance is left unchanged.

    Each training call costs one all-reduce of ``channels + 1`` float64 numbers, and its gradient
    one of ``channels``. As with `SyncBatchNormalization`, every replica has to make every training
    call.

    Args:
        axis: The axis (or axes) of the channels, typically that of the features.
        momentum: That of the moving average, as for `SyncBatchNormalization`.
        moving_mean_initializer: The initializer of the moving mean.
        communicator, group_size, groups, target_batch: As for `SyncBatchNormalization`.
        **kwargs: The arguments of any layer.

    Raises:
        ValueError: ``momentum`` outside of [0, 1], an unknown ``communicator``, groups that no job
            could have.
        TypeError: an ``axis`` that is no integer, a ``communicator`` that is not one, a momentum
            that is neither a number nor a scalar variable.

    Example:
        >>> layer = syncbn.SyncCentering()
        >>> print(layer(tf.constant([[1.0], [3.0]]), training=True).numpy())
        [[-1.]
         [ 1.]]
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: Any = 0.99,
        *,
        moving_mean_initializer: Any = "zeros",
        communicator: str | Communicator = "auto",
        group_size: int | str | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        target_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        grouping = check_grouping(group_size, groups, target_batch)
        super().__init__(momentum, communicator, grouping, **kwargs)
        self.axis = integer_axes(axis)
        self.moving_mean_initializer = keras_api.keras.initializers.get(moving_mean_initializer)

    def build(self, input_shape: Any) -> None:
        shape = self._check_input_shape(input_shape)
        sizes = {axis: shape[axis] for axis in normalized_axes(self.axis, shape)}
        self.moving_mean = self.add_statistic(
            "moving_mean", tuple(sizes.values()), self.moving_mean_initializer
        )
        self._build_count(self.moving_mean.shape)
        self.input_spec = keras_api.keras.layers.InputSpec(ndim=len(shape), axes=sizes)
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        initializer = keras_api.keras.initializers.serialize(self.moving_mean_initializer)
        axis = self.axis if isinstance(self.axis, int) else list(self.axis)
        return {**super().get_config(), "axis": axis, "moving_mean_initializer": initializer}

    def _statistics(self) -> tuple[str, ...]:
        return ("moving_mean",)

    def _call_training(
        self,
        inputs: tf.Tensor,
        axes: tuple[int, ...],
        mask: tf.Tensor | None,
        replicas: Replicas,
        before: Mapping[str, tf.Tensor],
    ) -> tuple[tf.Tensor, ...]:
        outputs, moments = center(inputs, axes=axes, replicas=replicas, mask=mask)
        return outputs, moments.count, moments.mean

    def _call_inference(self, inputs: tf.Tensor) -> tf.Tensor:
        mean = tf.reshape(tf.convert_to_tensor(self.moving_mean), [-1])
        axes = normalized_axes(self.axis, inputs.shape.as_list())
        wide = tf.cast(inputs, mean.dtype)
        return tf.cast(wide - broadcast_channels(mean, inputs, axes), self.compute_dtype)
