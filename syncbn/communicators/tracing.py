"""What is being traced: whether XLA compiles it, whether a forward pass repeats, who calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import tensorflow as tf

# There is no public way to learn this while a function is traced; after the trace XLA's own
# message names neither the layer nor the way out. Tried with TensorFlow 2.16 and 2.21;
# tests/single/test_jit.py holds it.
from tensorflow.python.ops import control_flow_util


def refuse_xla(engine: str) -> None:
    """Raises where a function that XLA compiles as a whole is being traced.

    Raises:
        NotImplementedError: ``engine`` leaves the graph, which compiled code cannot.
    """
    if tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    if control_flow_util.GraphOrParentsInXlaContext(graph):
        raise NotImplementedError(
            f"XLA cannot compile a collective of {engine}. Received: a training call inside a "
            "function that XLA compiles. Use jit_compile=False. (In `Model.compile`, 'auto' asks "
            "the layers, but not the optimizer.)"
        )


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
