"""The layers that are measured, by name."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

import syncbn

KERAS_3 = hasattr(tf.keras, "Variable")


class FusedBatchNorm(tf.Module):
    """TensorFlow's fused batch normalization in training form, on one replica, and no more."""

    def __init__(self, **_: object):
        super().__init__()

    def build(self, shape: tuple[int, ...]) -> None:
        """Creates gamma and beta, each ``(channels,)``."""
        self.gamma = tf.Variable(tf.ones(shape[-1]))
        self.beta = tf.Variable(tf.zeros(shape[-1]))

    def __call__(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        """Returns ``x``, ``(batch, height, width, channels)``, normalized."""
        none = tf.zeros([0])
        return tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self.gamma,
            offset=self.beta,
            mean=none,
            variance=none,
            epsilon=1e-3,
            is_training=True,
        ).y


def keras_synchronized(**options: object) -> tf.keras.layers.Layer:
    """Returns Keras' own synchronized layer."""
    if KERAS_3:
        return tf.keras.layers.BatchNormalization(synchronized=True, **options)
    return tf.keras.layers.experimental.SyncBatchNormalization(**options)


def horovods_own(**options: object) -> tf.keras.layers.Layer:
    """Returns Horovod's own layer, which is one of Keras 2."""
    import horovod.tensorflow as hvd

    return hvd.SyncBatchNormalization(**options)


def ours_unsynchronized(**options: object) -> tf.keras.layers.Layer:
    """Returns ours without synchronization."""
    return syncbn.SyncBatchNormalization(communicator="local", **options)


def over_mpi(**options: object) -> tf.keras.layers.Layer:
    """Returns ours over MPI, in a Horovod job that MPI has started."""
    import mpi4py.MPI  # noqa: F401  (which Horovod has initialized)

    return syncbn.SyncBatchNormalization(communicator="mpi", **options)


LAYERS: dict[str, Callable[..., tf.keras.layers.Layer]] = {
    "syncbn": syncbn.SyncBatchNormalization,
    "syncbn local": ours_unsynchronized,
    "syncbn over MPI": over_mpi,
    "keras": tf.keras.layers.BatchNormalization,
    "keras synchronized": keras_synchronized,
    "horovod": horovods_own,
    "fused op": FusedBatchNorm,
}


def make(name: str, shape: tuple[int, ...], dtype: str, number: int) -> tf.keras.layers.Layer:
    """Returns a layer that is built.

    Args:
        name: A key of `LAYERS`.
        shape: The shape of its input.
        dtype: ``"float32"``, or a mixed-precision policy.
        number: The number in the layer's name, by which Horovod tells messages apart.
    """
    policy = tf.keras.mixed_precision.Policy(dtype)
    layer = LAYERS[name](dtype=policy, name=f"normalization_{number}")
    layer.build(shape)
    return layer
