"""The functions that are running: where TensorFlow and Keras tell nobody what they are at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import tensorflow as tf


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
