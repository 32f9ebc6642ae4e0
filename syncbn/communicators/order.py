"""Sums over processes in program order, in whatever order TensorFlow would run them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import tensorflow as tf

from syncbn.communicators.tracing import in_branch_or_loop
from syncbn.ops.differentiation import local

AddUp = Callable[[tf.Tensor, str], tf.Tensor]
"""Adds a tensor up over processes, under a name; not differentiable."""

_numbers = itertools.count()


class Order:
    """Keeps sums in the order in which the program states them, one after the other.

    TensorFlow runs operations without a path between them in any order, and the iterations of a
    loop side by side. Accesses to a variable stay in program order, across nested functions, loops
    and branches, so each sum touches one before and after.
    """

    def __init__(self) -> None:
        self._variable: tf.Tensor | None = None

    def turn(self) -> Turn:
        """Returns what runs the sums of one call, and of its gradient."""
        return Turn(self)

    def variable(self) -> tf.Tensor:
        """Returns the handle of the variable, made at the first use."""
        # Not a `tf.Variable`, of which a strategy would make one for each of its replicas.
        if self._variable is None:
            with tf.init_scope(), tf.device("CPU:0"):
                handle = tf.raw_ops.VarHandleOp(
                    dtype=tf.int64, shape=[], shared_name=f"syncbn/order/{next(_numbers)}"
                )
                tf.raw_ops.AssignVariableOp(resource=handle, value=tf.zeros([], tf.int64))
            self._variable = handle
        return self._variable


class Turn:
    """The sums of one call and of its gradient, in an `Order`."""

    def __init__(self, order: Order):
        self._order = order
        self._handle: tf.Tensor | None = None

    def all_reduce_sum(self, add_up: AddUp, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns ``add_up(tensor, name)``, differentiable to any order."""

        @tf.custom_gradient
        def reduce(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return self.all_reduce_sum(add_up, upstream, f"{name}/gradient")

            if tf.executing_eagerly():
                return add_up(tensor, name), gradient
            begin = _touch(self._order.variable() if self._handle is None else self._handle)
            if in_branch_or_loop():
                # The gradient may take the variable from here, and not from outside.
                self._handle = begin.inputs[0]
            with tf.control_dependencies([begin]):
                total = add_up(tensor, name)
            with tf.control_dependencies([total]):
                _touch(begin.inputs[0])
            return total, gradient

        return reduce(local(tensor))


def _touch(handle: tf.Tensor) -> tf.Operation:
    operation = tf.raw_ops.AssignAddVariableOp(resource=handle, value=tf.ones([], tf.int64))
    # A vectorized loop (see there) takes one turn for all iterations.
    operation.pfor_converter = lambda loop: _touch(loop.unstacked_input(0))
    return operation
