"""Graphs that a session of TensorFlow 1 runs: what the layers do differently there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat.keras_api import KERAS_3
from syncbn._src.ops.graphs import runs_side_effects


def in_session_graph() -> bool:
    """Says whether a graph of TensorFlow 1 is being built: one that a session will run."""
    # A function runs its side effects by itself, in a session too.
    return not (tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function)


def require_updates() -> None:
    if KERAS_3:
        raise NotImplementedError(
            "Keras 3 has no updates that a session could run. Received: a training call in a "
            "graph of TensorFlow 1. Use Keras 2: pip install tf_keras, and set "
            "TF_USE_LEGACY_KERAS=1 before importing TensorFlow."
        )
    graph = tf.compat.v1.get_default_graph()
    if graph.building_function and not runs_side_effects(graph, otherwise=True):
        raise NotImplementedError(
            "A session cannot run updates of the moving statistics that are inside of a branch or "
            "loop. Received: a training call inside of tf.cond or tf.while_loop. Call the layer "
            "outside, and give it the condition: layer(x, training=condition)."
        )


def cond(predicate: tf.Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    """Calls `tf.cond`, so that custom gradients in its branches work in a session's graph too.

    There, inside of a Keras layer, control flow v2 ignores custom gradients and differentiates the
    operations of a branch, and in doing so loses an input (tried with 2.21). Control flow v1 is
    right.
    """
    newer = tf.compat.v1.control_flow_v2_enabled()
    if not (newer and in_session_graph()):
        return tf.cond(predicate, true_fn, false_fn)
    tf.compat.v1.disable_control_flow_v2()
    try:
        return tf.cond(predicate, true_fn, false_fn)
    finally:
        tf.compat.v1.enable_control_flow_v2()
