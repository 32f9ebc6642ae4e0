"""The seam between the two Kerases: the only module that knows which one `tf.keras` is.

`tf.keras` is Keras 3, or Keras 2 (the package ``tf_keras``) where ``TF_USE_LEGACY_KERAS=1`` was
set before TensorFlow was imported. Tried with Keras 3.15, and tf_keras 2.16 and 2.21.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras = tf.keras

KERAS_3 = hasattr(keras, "Variable")
"""Whether `tf.keras` is Keras 3; Keras 2 had no variables of its own."""

if KERAS_3 and keras.config.backend() != "tensorflow":
    raise ImportError(
        "syncbn needs Keras with the TensorFlow backend. Received: KERAS_BACKEND="
        f"{keras.config.backend()}. Set KERAS_BACKEND=tensorflow before importing Keras."
    )

register_keras_serializable = keras.utils.register_keras_serializable


class StatisticsLayer(keras.layers.Layer):  # type: ignore[name-defined]
    """A layer that can hold moving statistics, in either Keras.

    A moving statistic is a weight that is not trained, float32 at least, and synchronized
    ``ON_READ`` with aggregation ``MEAN``: each replica has and updates a copy of its own, and
    whoever looks at it from outside of the replicas sees their mean.
    """

    def add_statistic(self, name: str, shape: Any, initializer: Any, dtype: Any = None) -> Any:
        """Creates a moving statistic. ``dtype`` is the layer's, but float32 at least."""
        if dtype is None:
            own = tf.as_dtype(self.variable_dtype if KERAS_3 else self.dtype or "float32")
            dtype = "float64" if own == tf.float64 else "float32"
        if not KERAS_3:
            return super().add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer=initializer,
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.MEAN,
                experimental_autocast=False,
            )
        # `Layer.add_weight` of Keras 3 cannot synchronize on read; a variable can. The layer
        # tracks it when it is assigned to an attribute.
        return keras.Variable(
            keras.initializers.get(initializer),
            shape=shape,
            dtype=dtype,
            trainable=False,
            autocast=False,
            synchronization="on_read",
            aggregation="mean",
            name=name,
        )

    if KERAS_3:

        def add_weight(
            self,
            shape: Any = None,
            initializer: Any = None,
            *args: Any,
            trainable: bool = True,
            name: str | None = None,
            **kwargs: Any,
        ) -> Any:
            # Keras' own batch normalization makes its moving statistics here.
            if name in ("moving_mean", "moving_variance"):
                return self.add_statistic(name, shape, initializer)
            return super().add_weight(
                shape, initializer, *args, trainable=trainable, name=name, **kwargs
            )


def layer_path(layer: Any) -> str:
    """Returns a name for ``layer`` that is the same on all workers that build the same model."""
    return layer.path if KERAS_3 else layer.name


def training_mode(layer: Any, training: Any) -> Any:
    """Returns whether a call trains: a bool, or in a graph of Keras 2 possibly a tensor.

    ``None`` is Keras 2's learning phase, and false in Keras 3. A frozen layer does not train.
    """
    if not layer.trainable:
        return False
    if training is None:
        training = False if KERAS_3 else keras.backend.learning_phase()
    if tf.is_tensor(training):
        static = tf.get_static_value(training)
        return training if static is None else bool(static)
    return bool(training)


_NEVER_TRAINED = ("scratch_graph", "_layer_call_fn", "_layer_call_and_return_conditional_losses")


def never_trains() -> bool:
    """Says whether Keras is tracing a layer into a graph that trains nothing.

    Both Kerases call layers in a scratch graph, just to learn the shape and dtype of their outputs;
    and Keras 2 traces them, training included, when it writes a SavedModel. Both happen outside of
    replicas and maybe without the engine, so such a trace must not communicate. There is no public
    way to learn of it: the graphs are known by their names.
    """
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if any(name in getattr(graph, "name", "") for name in _NEVER_TRAINED):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False
