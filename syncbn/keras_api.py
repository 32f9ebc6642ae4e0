"""The seam between the two Kerases: the only module that knows which one `tf.keras` is.

`tf.keras` is Keras 3, or Keras 2 (the package ``tf_keras``) where ``TF_USE_LEGACY_KERAS=1`` was
set before TensorFlow was imported. Tried with Keras 3.15, and tf_keras 2.16 and 2.21.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn.communicators.tracing import callers

keras = tf.keras

KERAS_3 = hasattr(keras, "Variable")
"""Whether `tf.keras` is Keras 3; Keras 2 had no variables of its own."""

if KERAS_3 and keras.config.backend() != "tensorflow":
    raise ImportError(
        "syncbn needs Keras with the TensorFlow backend. Received: KERAS_BACKEND="
        f"{keras.config.backend()}. Set KERAS_BACKEND=tensorflow before importing Keras."
    )

VARIABLES: tuple[type, ...] = (tf.Variable, keras.Variable) if KERAS_3 else (tf.Variable,)
"""What a user can have as a variable."""

register_keras_serializable = keras.utils.register_keras_serializable

OPTIMIZERS: tuple[type, ...] = (keras.optimizers.Optimizer,)
"""The base classes of the optimizers of `tf.keras`."""
if not KERAS_3:
    OPTIMIZERS += (keras.optimizers.legacy.Optimizer,)


# Looked up once: users may put a layer of this package under the host's name later, for code that
# looks it up there.
PLAIN_BATCH_NORMALIZATION: Any = keras.layers.BatchNormalization
"""The batch normalization of `tf.keras`."""

BATCH_NORMALIZATION: Any = PLAIN_BATCH_NORMALIZATION
"""What all batch normalizations of `tf.keras` come from; that of Keras 2 is not public."""
if not KERAS_3:
    BATCH_NORMALIZATION = BATCH_NORMALIZATION.__base__

_STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


class StatisticsLayer(keras.layers.Layer):  # type: ignore[name-defined]
    """A layer that can hold moving statistics, in either Keras.

    A moving statistic is a weight that is not trained, float32 at least, and synchronized
    ``ON_READ`` with aggregation ``MEAN``: each replica has and updates a copy of its own, and
    whoever looks at it from outside of the replicas sees their mean, up to its rounding.
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

    def update_statistic(self, statistic: Any, value: tf.Tensor) -> None:
        """Assigns ``value`` to a moving statistic.

        In the graph of a session nothing runs by itself. There the assignment becomes one of the
        layer's updates, and one of the collection ``UPDATE_OPS``.

        Raises:
            NotImplementedError: a session could not run the assignment: that of a layer of Keras 3,
                or in a branch or loop.
        """
        if not tf.compat.v1.executing_eagerly_outside_functions():
            _require_updates()
        update = statistic.assign(value)
        if in_session_graph():
            self.add_update(update)
            tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.UPDATE_OPS, update.op)

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
            if name in _STATISTICS:
                return self.add_statistic(name, shape, initializer)
            return super().add_weight(
                shape, initializer, *args, trainable=trainable, name=name, **kwargs
            )


def renorm_arguments(**arguments: Any) -> dict[str, Any]:
    """Returns arguments for the renormalization of the host's `BatchNormalization`.

    Raises:
        NotImplementedError: it has none.
    """
    known = inspect.signature(PLAIN_BATCH_NORMALIZATION.__init__).parameters
    if KERAS_3 and "renorm" not in known:
        raise NotImplementedError(
            "renorm=True needs a Keras whose BatchNormalization has it: Keras 3.14, or Keras 2. "
            f"Received: Keras {keras.__version__}. Update it: pip install -U keras."
        )
    return arguments


def named_layers(model: Any) -> dict[str, Any]:
    """Returns the layers of ``model``, each once, by names such as ``"block/normalization"``.

    They come in the order in which they are tracked, layers of layers after the layer around them.
    """
    found: dict[str, Any] = {}
    seen = {id(model)}

    def walk(outer: Any, prefix: str) -> None:
        # Both Kerases have this method for themselves; `Model.layers` leaves out the layers of
        # layers.
        for layer in outer._flatten_layers(recursive=False, include_self=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            name, number = prefix + layer.name, 1
            while name in found:
                name, number = f"{prefix}{layer.name}_{number}", number + 1
            found[name] = layer
            walk(layer, f"{name}/")

    walk(model, "")
    return found


def variable(weight: Any) -> Any:
    """Returns the variable of TensorFlow that a weight of Keras, or that itself, is."""
    return weight.value if KERAS_3 and isinstance(weight, keras.Variable) else weight


def short_name(weight: Any) -> str:
    """Returns the name that a layer has for its weight, such as ``"moving_mean"``."""
    return weight.name if KERAS_3 else weight.name.rpartition("/")[2].partition(":")[0]


def layer_path(layer: Any) -> str:
    """Returns a name for ``layer`` that is the same on all workers that build the same model."""
    return layer.path if KERAS_3 else layer.name


def draws_numbers(layer: Any) -> bool:
    """Says whether a layer has a generator of random numbers."""
    if KERAS_3:
        return any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    return isinstance(layer, keras.__internal__.layers.BaseRandomLayer)


def prepare_training(model: Any, data: tuple[Any, ...]) -> None:
    """Does what `fit` does before the first `train_step`; within the strategy's scope."""
    if KERAS_3:
        # Metrics and the loss are otherwise built in replicas, which must not make variables. There
        # is no public way.
        model._symbolic_build(data_batch=tf.nest.map_structure(tf.constant, data))


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


def in_session_graph() -> bool:
    """Says whether a graph of TensorFlow 1 is being built: one that a session will run."""
    # A function runs its side effects by itself, in a session too.
    return not (tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function)


def _require_updates() -> None:
    if KERAS_3:
        raise NotImplementedError(
            "Keras 3 has no updates that a session could run. Received: a training call in a "
            "graph of TensorFlow 1. Use Keras 2: pip install tf_keras, and set "
            "TF_USE_LEGACY_KERAS=1 before importing TensorFlow."
        )
    # No public way says whether a graph, that of a function or that of a branch, runs side effects.
    graph = tf.compat.v1.get_default_graph()
    if graph.building_function and not getattr(graph, "_add_control_dependencies", True):
        raise NotImplementedError(
            "A session cannot run updates of the moving statistics that are inside of a branch or "
            "loop. Received: a training call inside of tf.cond or tf.while_loop. Call the layer "
            "outside, and give it the condition: layer(x, training=condition)."
        )


def cond(predicate: tf.Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    """Is `tf.cond`, whose branches may hold custom gradients in the graph of a session too.

    There, inside of a Keras layer, TensorFlow's newer control flow differentiates all that a branch
    computes, whatever custom gradients say, and in doing so loses an input (tried with 2.21). The
    older one is right.
    """
    newer = tf.compat.v1.control_flow_v2_enabled()
    if not (newer and in_session_graph()):
        return tf.cond(predicate, true_fn, false_fn)
    tf.compat.v1.disable_control_flow_v2()
    try:
        return tf.cond(predicate, true_fn, false_fn)
    finally:
        tf.compat.v1.enable_control_flow_v2()


# Keras 2 tells nobody what a graph is for, so its own functions are looked for among the callers.
# Tried with tf_keras 2.21; tests/single/test_traces.py holds it.
_INFERS_SHAPES = {
    ("tf_keras.src.engine.base_layer", "_infer_output_signature"),
    ("tf_keras.src.engine.base_layer", "compute_output_shape"),
    ("tf_keras.src.engine.training", "build"),
}
_SAVES = "tf_keras.src.saving.legacy.saved_model.save_impl"


def never_trains() -> bool:
    """Says whether Keras is tracing a layer into a graph that trains nothing.

    Both Kerases call layers just to learn the shape and dtype of their outputs, and Keras 2 traces
    them, training included, when it writes a SavedModel. Both happen outside of replicas and maybe
    without the engine, so such a trace must not communicate.
    """
    if tf.executing_eagerly():
        return False
    if KERAS_3:
        with keras.SymbolicScope() as scope:
            return scope.original_scope is not None
    return any(module == _SAVES or (module, name) in _INFERS_SHAPES for module, name in callers())
