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


class HandleAround:
    """A variable's handle in each of the graphs around a call, for the gradient of the call.

    The gradient of a loop cannot take an eager tensor. What it takes of a tensor inside of the loop
    is an output of the loop, which for TensorFlow is another variable: it would be accessed in no
    order with what is beside the loop. So the gradient takes the tensor from around the loop.

    Args:
        handle: The handle, an eager tensor.
    """

    def __init__(self, handle: tf.Tensor):
        self._graphs = _graphs_to_function()
        self._handles = [graph.capture(handle) for graph in self._graphs]

    def in_gradient(self) -> tf.Tensor | None:
        """Returns the handle as it is in the gradient of a loop, if that is what is being traced.

        Nothing else needs it. A gradient in another function, and that of a loop in a branch in a
        loop, cannot take it.
        """
        graphs = _graphs_to_function()
        depth = next((n for n, graph in enumerate(graphs) if graph in self._graphs), None)
        if depth is None:
            return None
        # Those further out are around the gradient only, such as a branch in which it is taken.
        inner = min(depth, self._graphs.index(graphs[depth]))
        loops = [n for n, graph in enumerate(graphs[:inner]) if isinstance(graph, _LOOPS)]
        if not loops:
            return None
        last = loops[-1] + 1
        if len(loops) < last - loops[0]:  # a branch is between two of them
            return None
        handle = self._handles[last]
        for graph in reversed(graphs[:last]):
            handle = graph.capture(handle)  # a branch takes nothing but from the graph around it
        return handle


def _graphs_to_function() -> list[Any]:
    """Returns the branches and loops that are being traced, inner ones first, and the function."""
    found = [tf.compat.v1.get_default_graph()]
    while isinstance(found[-1], _BRANCHES_AND_LOOPS):
        found.append(found[-1].outer_graph)
    return found
