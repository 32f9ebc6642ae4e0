"""Where a collective cannot be traced: for XLA, and under forward-mode differentiation."""

from __future__ import annotations

import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.differentiation import has_tangent
from syncbn._src.ops.graphs import copied_branches


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
