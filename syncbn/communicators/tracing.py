"""What is being traced: whether XLA compiles it, whether a forward pass repeats, who calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.python.ops import control_flow_v2_func_graphs

from syncbn.ops import xla
from syncbn.ops.differentiation import differentiates_copy, has_tangent


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
            it follows something else through the branch of the collective, of whose copy the
            collective has no gradient.
    """
    if not tf.executing_eagerly() and (has_tangent(tensor) or differentiates_copy()):
        raise NotImplementedError(
            f"Forward-mode differentiation cannot follow a collective of {engine} inside of a "
            "graph. Received: a training call under a tf.autodiff.ForwardAccumulator that was made "
            "inside of the tf.function. Make it outside, around the call of the function."
        )


def in_branch_or_loop() -> bool:
    """Says whether what is being traced is inside of a branch or loop of a graph."""
    # There is no public way to learn this. Tried with TensorFlow 2.21;
    # tests/parallel/test_control_flow.py holds it.
    kinds = (
        control_flow_v2_func_graphs.CondBranchFuncGraph,
        control_flow_v2_func_graphs.WhileBodyFuncGraph,
        control_flow_v2_func_graphs.WhileCondFuncGraph,
    )
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and not isinstance(graph, kinds):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def repeats_forward() -> bool:
    """Says whether `tf.recompute_grad` is repeating a forward pass, to differentiate it.

    TensorFlow tells nobody, so this looks for its function among the callers. Tried with TensorFlow
    2.16 and 2.21; tests/single/test_recompute.py holds it.
    """
    return (tf.recompute_grad.__module__, "inner_recompute_grad") in callers()


def callers() -> Iterator[tuple[str, str]]:
    """Yields the module and the name of each function that is running, innermost first.

    Unlike the name of a graph, the module is nothing that a user's function has by accident.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back


_Function = TypeVar("_Function", bound=Callable[..., Any])


def unconverted(function: _Function) -> _Function:
    """Is `tf.autograph.experimental.do_not_convert`, and shows the signature of ``function``.

    TensorFlow's wrapper has ``*args, **kwargs``, and `inspect.getfullargspec` says so. Wrappers ask
    it whether a layer takes a mask, or whether it knows of training.
    """
    wrapper = tf.autograph.experimental.do_not_convert(function)
    wrapper.__signature__ = inspect.signature(function)
    return wrapper
