"""What is being traced: for XLA, under forward-mode differentiation, in a branch or loop."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.ops import control_flow_v2_func_graphs

from syncbn._src.ops import xla
from syncbn._src.ops.differentiation import differentiates_copy, has_tangent


def refuse_xla(engine: str) -> None:
    """Raises where a function that XLA compiles as a whole is being traced.

    Raises:
        NotImplementedError: ``engine`` leaves the graph, which compiled code cannot.
    """
    if xla.compiles_everything():
        raise NotImplementedError(
            f"XLA cannot compile a collective of {engine}. Received: a training call inside a "
            "function that XLA compiles. Use jit_compile=False. (In `Model.compile`, 'auto' asks "
            "the layers, but not the optimizer.)"
        )


def refuse_forward_mode(engine: str, tensor: tf.Tensor) -> None:
    """Raises where a `tf.autodiff.ForwardAccumulator` inside of a graph goes through a collective.

    Raises:
        NotImplementedError: TensorFlow would take the tangent of a collective for zero. Also where
            it follows another tensor through the same branch, in whose copy the collective has no
            gradient.
    """
    if not tf.executing_eagerly() and (has_tangent(tensor) or differentiates_copy()):
        raise NotImplementedError(
            f"Forward-mode differentiation cannot follow a collective of {engine} inside of a "
            "graph. Received: a training call under a tf.autodiff.ForwardAccumulator that was made "
            "inside of the tf.function. Make it outside, around the call of the function."
        )


def in_branch_or_loop() -> bool:
    """Says whether what is being traced is inside of a branch or loop of a graph."""
    # There is no public API for this. Tried with TensorFlow 2.21;
    # tests/parallel/test_control_flow.py covers it.
    kinds = (
        control_flow_v2_func_graphs.CondBranchFuncGraph,
        control_flow_v2_func_graphs.WhileBodyFuncGraph,
        control_flow_v2_func_graphs.WhileCondFuncGraph,
    )
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and not isinstance(graph, kinds):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None
