"""Moving statistics: weights that are synchronized on read, in Keras 2 and 3."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat.keras_api import KERAS_3, keras
from syncbn._src.keras_compat.session_graphs import in_session_graph, require_updates
from syncbn._src.ops.channels import statistics_dtype
from syncbn._src.ops.graphs import in_session

_STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


class StatisticsLayer(keras.layers.Layer):
    """A layer that can have moving statistics, in Keras 2 and 3.

    A moving statistic is a weight that is not trained, float32 at least, and synchronized
    ``ON_READ`` with aggregation ``MEAN``: each replica has and updates its own copy, and a read
    outside of the replicas returns the mean of the copies, up to rounding.
    """

    def add_statistic(self, name: str, shape: Any, initializer: Any, dtype: Any = None) -> Any:
        """Creates a moving statistic. ``dtype`` is by default the layer's, but float32 at least."""
        if dtype is None:
            own = tf.as_dtype(self.variable_dtype if KERAS_3 else self.dtype or "float32")
            dtype = statistics_dtype(own).name
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

    def update_statistic(self, statistic: Any, value: tf.Tensor) -> None:
        """Assigns ``value`` to a moving statistic.

        In the graph of a session nothing runs by itself. There the assignment becomes one of the
        layer's updates, and one of the collection ``UPDATE_OPS``.

        Raises:
            NotImplementedError: a session could not run the assignment: in Keras 3, or in a branch
                or loop.
        """
        if in_session():
            require_updates()
        update = statistic.assign(value)
        if in_session_graph():
            self.add_update(update)
            tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.UPDATE_OPS, update.op)

    def load_own_variables(self, store: Any) -> None:
        """Loads the layer's variables from a file of Keras.

        Raises:
            ValueError: the file has none for it, or others.
        """
        if self.weights and not len(store.keys()):
            raise ValueError(
                "A file of Keras must have the weights of each layer, by the layer's class. "
                f"Received: none for {self.name}, a {type(self).__name__}. If the file was saved "
                "from a model with plain BatchNormalization, load it into such a model, and then "
                "call syncbn.convert_sync_batchnorm(model). tf.train.Checkpoint needs no detour."
            )
        super().load_own_variables(store)

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
            # Keras' own batch normalization creates its moving statistics here.
            if name in _STATISTICS:
                return self.add_statistic(name, shape, initializer)
            return super().add_weight(
                shape, initializer, *args, trainable=trainable, name=name, **kwargs
            )
