"""Vectorized loops: `tf.vectorized_map`, and jacobians.

TensorFlow converts the operations of such a loop one by one, each to one for all iterations. An
operation without a converter becomes a loop again, in which nothing keeps collectives in order; and
TensorFlow takes what other replicas compute for the same in all iterations. There is no public API
to register a converter. Tried with TensorFlow 2.21; tests/single/test_accuracy.py,
tests/single/test_watchdog.py and tests/parallel/test_control_flow.py cover it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import tensorflow as tf
from tensorflow.python.ops.parallel_for.pfor import wrap


def convert_loops_with(operation: tf.Operation, convert: Callable[[Any], Any]) -> None:
    """Makes a vectorized loop convert ``operation`` by ``convert``.

    Args:
        operation: An operation of a graph.
        convert: Takes the loop, with the converted ``inputs``, and returns the converted outputs.
    """
    operation.pfor_converter = convert


def same_in_all_iterations(tensor: tf.Tensor) -> Any:
    """Returns ``tensor`` as a converted output that does not differ between iterations."""
    return wrap(tensor, False)


def vectorized(
    total: tf.Tensor, again: Callable[[tf.Tensor], tf.Tensor], number: Callable[[], int] = lambda: 0
) -> tf.Tensor:
    """Returns ``total``, which a vectorized loop computes for all iterations at once.

    Args:
        total: The output of an operation, in a graph, or a copy of one.
        again: Computes the outputs of all iterations, given their inputs as rows.
        number: Returns the index of the operation's input that is summed.
    """

    def convert(loop: Any) -> list[Any]:
        wrapped = loop.inputs[number()]
        return [wrapped._replace(t=again(wrapped.t))]

    operation = total.op
    while operation.type == "Identity":  # whose input is converted first
        operation = operation.inputs[0].op
    convert_loops_with(operation, convert)
    return total


def refused(tensor: tf.Tensor, engine: str) -> tf.Tensor:
    """Returns a copy of ``tensor``, for a sum that a vectorized loop cannot compute.

    Such a loop raises `NotImplementedError`.
    """

    def convert(loop: Any) -> NoReturn:
        raise NotImplementedError(
            f"A vectorized loop cannot contain a collective of {engine}. Received: a training call "
            "in tf.vectorized_map, or the jacobian of one. Use tf.map_fn, or "
            "jacobian(..., experimental_use_pfor=False), where the strategy allows it."
        )

    own = tf.identity(tensor)
    if not tf.executing_eagerly():
        convert_loops_with(own.op, convert)
    return own
