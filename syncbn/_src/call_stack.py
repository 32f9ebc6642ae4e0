"""The call stack, for where TensorFlow and Keras do not expose what they are doing."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import FrameType

import tensorflow as tf


def repeats_forward() -> bool:
    """Says whether `tf.recompute_grad` is repeating a forward pass, to differentiate it.

    TensorFlow does not expose this, so its function is looked for among the callers. Tried with
    TensorFlow 2.16 and 2.21; tests/single/test_recompute.py covers it.
    """
    return (tf.recompute_grad.__module__, "inner_recompute_grad") in callers()


def loses_gradients() -> bool:
    """Says whether `tf.recompute_grad` runs inside of a vectorized loop of a graph.

    TensorFlow then takes the gradients of variables for zero: such a loop forgets the custom
    gradient, which was to give them. (Eagerly the loop is a function, and its gradients are right.)
    Looks among the callers too. Tried with TensorFlow 2.21; tests/single/test_recompute.py holds
    it.
    """
    loops = tf.vectorized_map.__module__
    recomputes = False
    for function, caller in itertools.pairwise(callers()):
        if function == (tf.recompute_grad.__module__, "inner_recompute_grad"):
            return False  # the loop is that of a jacobian, whose gradients are right
        recomputes = recomputes or function == (tf.recompute_grad.__module__, "inner")
        if recomputes and (function, caller) == ((loops, "f"), (loops, "pfor")):
            return True
    return False


def callers() -> Iterator[tuple[str, str]]:
    """Yields the module and the name of each function that is running, innermost first.

    Unlike the name of a graph, a module is not something that a user's function has by accident.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back
