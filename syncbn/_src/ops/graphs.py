"""The graph that is being built, and those around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# There is no public API for branches and loops. Tried with TensorFlow 2.21;
# tests/parallel/test_control_flow.py covers it.
from tensorflow.python.ops import control_flow_v2_func_graphs

_LOOPS = (
    control_flow_v2_func_graphs.WhileBodyFuncGraph,
    control_flow_v2_func_graphs.WhileCondFuncGraph,
)
_BRANCHES_AND_LOOPS = (*_LOOPS, control_flow_v2_func_graphs.CondBranchFuncGraph)


def enclosing() -> Iterator[Any]:
    """Yields the graph that is being built, and those around it, inner ones first."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)


def in_branch_or_loop() -> bool:
    """Says whether what is being traced is inside of a branch or loop of a graph."""
    return any(isinstance(graph, _BRANCHES_AND_LOOPS) for graph in enclosing())


def up_to_function() -> list[Any]:
    """Returns the branches and loops that are being traced, inner ones first, and the function."""
    found = []
    for graph in enclosing():
        found.append(graph)
        if not isinstance(graph, _BRANCHES_AND_LOOPS):
            break
    return found


def is_loop(graph: Any) -> bool:
    """Says whether a graph is the body of a loop, or its condition."""
    return isinstance(graph, _LOOPS)


def copied_branches() -> list[Any]:
    """Returns the copied branches whose gradients are being traced, as in forward mode."""
    # There is no public API for this. Tried with TensorFlow 2.21; tests/single/test_accuracy.py
    # covers it.
    branches = [getattr(graph, "_forward_graph", None) for graph in enclosing()]
    return [
        branch
        for branch in branches
        if branch is not None and not getattr(branch, "is_control_flow_graph", False)
    ]


def runs_side_effects(graph: Any, otherwise: bool) -> bool:
    """Says whether a function, branch or loop runs its side effects by itself.

    Args:
        graph: Its graph.
        otherwise: What to say where TensorFlow does not.
    """
    # There is no public API for this. Tried with TensorFlow 2.21;
    # tests/sessions/test_layers.py and tests/parallel/test_control_flow.py cover it.
    return getattr(graph, "_add_control_dependencies", otherwise)


def in_session() -> bool:
    """Says whether a session of TensorFlow 1 will run what is being built.

    That is a graph, or a function inside of one.
    """
    return not tf.compat.v1.executing_eagerly_outside_functions()


def traced_outside(
    function: Callable[..., Any], *specs: tf.TensorSpec, **options: Any
) -> Callable[..., Any]:
    """Returns ``function``, traced outside of the graph, replica and device of the call.

    TensorFlow warns of a `tf.function` that is called with one new signature after the other, but
    not of many such traces.

    Args:
        function: The function.
        *specs: Its inputs.
        **options: Of `tf.function`.
    """
    with tf.init_scope(), tf.device(None):
        return tf.function(function, autograph=False, **options).get_concrete_function(*specs)
