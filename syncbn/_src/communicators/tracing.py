"""What is being traced: for XLA, under forward-mode differentiation, in a branch or loop."""

from __future__ import annotations

from typing import Any

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


# There is no public API for branches and loops. Tried with TensorFlow 2.21;
# tests/parallel/test_control_flow.py covers it.
_LOOPS = (
    control_flow_v2_func_graphs.WhileBodyFuncGraph,
    control_flow_v2_func_graphs.WhileCondFuncGraph,
)
_BRANCHES_AND_LOOPS = (*_LOOPS, control_flow_v2_func_graphs.CondBranchFuncGraph)


def in_branch_or_loop() -> bool:
    """Says whether what is being traced is inside of a branch or loop of a graph."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and not isinstance(graph, _BRANCHES_AND_LOOPS):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def captured_outside_of_loops(eager: tf.Tensor) -> tf.Tensor | None:
    """Returns an eager tensor as it is around the outermost loop that is being traced, if any."""
    loops, _ = _loops_and_function(tf.compat.v1.get_default_graph())
    return loops[-1].outer_graph.capture(eager) if loops else None


def captured_by_gradient(outside: tf.Tensor) -> tf.Tensor | None:
    """Returns such a tensor as it is in the gradient of the loop that is being traced.

    Or nothing, where that gradient belongs to another function.
    """
    loops, function = _loops_and_function(tf.compat.v1.get_default_graph())
    if not loops or _loops_and_function(outside.graph)[1] is not function:
        return None
    for graph in reversed(loops):  # a branch takes nothing that is not in the graph around it
        outside = graph.capture(outside)
    return outside


def _loops_and_function(graph: Any) -> tuple[list[Any], Any]:
    """Returns the graphs from ``graph`` to the outermost loop's, and that of the function."""
    found, last = [], 0
    while isinstance(graph, _BRANCHES_AND_LOOPS):
        found.append(graph)
        last = len(found) if isinstance(graph, _LOOPS) else last
        graph = graph.outer_graph
    return found[:last], graph
