"""What is being traced: for XLA, under forward-mode differentiation, in a branch or loop."""

from __future__ import annotations

import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.differentiation import has_tangent
from syncbn._src.ops.graphs import copied_branches, is_loop, up_to_function


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


def refuse_transformations(engine: str, tensor: tf.Tensor) -> None:
    """Raises where XLA, or forward mode inside of a graph, would transform a collective.

    Raises:
        NotImplementedError: see `refuse_xla`; or a `tf.autodiff.ForwardAccumulator` is followed,
            for which TensorFlow would take the tangent of a collective for zero. Also where it
            follows another tensor through the same branch, in whose copy the collective has no
            gradient.
    """
    refuse_xla(engine)
    if not tf.executing_eagerly() and (has_tangent(tensor) or copied_branches()):
        raise NotImplementedError(
            f"Forward-mode differentiation cannot follow a collective of {engine} inside of a "
            "graph. Received: a training call under a tf.autodiff.ForwardAccumulator that was made "
            "inside of the tf.function. Make it outside, around the call of the function."
        )


class HandleAround:
    """A variable's handle in each of the graphs around a call, for the gradient of the call.

    The gradient of a loop cannot take an eager tensor. What it takes of a tensor inside of the loop
    is an output of the loop, which for TensorFlow is another variable: it would be accessed in no
    order with what is beside the loop. So the gradient takes the tensor from around the loop.

    Args:
        handle: The handle, an eager tensor.
    """

    def __init__(self, handle: tf.Tensor):
        self._graphs = up_to_function()
        self._handles = [graph.capture(handle) for graph in self._graphs]

    def in_gradient(self) -> tf.Tensor | None:
        """Returns the handle as it is in the gradient of a loop, if that is what is being traced.

        Nothing else needs it. A gradient in another function, and that of a loop in a branch in a
        loop, cannot take it.
        """
        graphs = up_to_function()
        depth = next((n for n, graph in enumerate(graphs) if graph in self._graphs), None)
        if depth is None:
            return None
        # Those further out are around the gradient only, such as a branch in which it is taken.
        inner = min(depth, self._graphs.index(graphs[depth]))
        loops = [n for n, graph in enumerate(graphs[:inner]) if is_loop(graph)]
        if not loops:
            return None
        last = loops[-1] + 1
        if len(loops) < last - loops[0]:  # a branch is between two of them
            return None
        handle = self._handles[last]
        for graph in reversed(graphs[:last]):
            handle = graph.capture(handle)  # a branch takes nothing but from the graph around it
        return handle
