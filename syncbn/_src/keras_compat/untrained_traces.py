"""Graphs that train nothing, which Keras traces to infer shapes or to save."""

from __future__ import annotations

import tensorflow as tf

from syncbn._src.call_stack import callers
from syncbn._src.keras_compat.keras_api import KERAS_3, keras

# Keras 2 does not expose what a graph is for, so its functions are looked for among the callers.
# Tried with tf_keras 2.21; tests/single/test_traces.py covers it.
_INFERS_SHAPES = {
    ("tf_keras.src.engine.base_layer", "_infer_output_signature"),
    ("tf_keras.src.engine.base_layer", "compute_output_shape"),
    ("tf_keras.src.engine.training", "build"),
}
_SAVES = "tf_keras.src.saving.legacy.saved_model.save_impl"


def never_trains() -> bool:
    """Says whether Keras is tracing a layer into a graph that trains nothing.

    Keras 2 and 3 call layers just to infer the shape and dtype of their outputs, and Keras 2 traces
    them, training included, when it writes a SavedModel. Both happen outside of replicas and maybe
    without the engine, so such a trace must not communicate.
    """
    if tf.executing_eagerly():
        return False
    if KERAS_3:
        with keras.SymbolicScope() as scope:
            return scope.original_scope is not None
    return any(module == _SAVES or (module, name) in _INFERS_SHAPES for module, name in callers())
