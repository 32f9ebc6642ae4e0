"""Sums over processes in program order, in whatever order TensorFlow might run them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import tensorflow as tf
from tensorflow.python.ops import handle_data_util

from syncbn._src.ops.differentiation import in_current_graph
from syncbn._src.ops.graphs import in_branch_or_loop, is_loop, runs_side_effects, up_to_function
from syncbn._src.ops.vectorization import convert_loops_with, vectorized

Sum = Callable[[tf.Tensor, str, tf.Tensor | None], tf.Tensor]
"""Adds a tensor up over processes, under a name; not differentiable.

The last argument, where there is one, is a tensor that is equal on all processes but differs
between calls of the same name: it tells them apart."""

_numbers = itertools.count()


class Order:
    """Keeps sums in the order in which the program states them, one after the other.

    TensorFlow runs operations without a path between them in any order, and the iterations of a
    loop in parallel. Accesses to a variable stay in program order, across nested functions, loops
    and branches, so each sum touches one before and after.

    Args:
        everywhere: Whether sums with different names are kept in order too, or only those in
            branches and loops, which could overlap with themselves.
    """

    def __init__(self, everywhere: bool = True) -> None:
        self.everywhere = everywhere
        self._variable: tf.Tensor | None = None
        self._last: WeakKeyDictionary[tf.Graph, str] = WeakKeyDictionary()

    def last(self) -> list[tf.Operation]:
        """Returns the operation of this graph, if any, that the next one has to follow."""
        # Nothing else orders the backward function of a nested `tf.function`, which TensorFlow
        # makes without automatic control dependencies.
        graph = tf.compat.v1.get_default_graph()
        return [graph.get_operation_by_name(self._last[graph])] if graph in self._last else []

    def follow(self, operation: tf.Operation) -> None:
        """Makes the next sum of this graph, and callers of the graph, wait for ``operation``."""
        graph = operation.graph
        self._last[graph] = operation.name
        # Automatic control dependencies, where there are some, take care of the callers.
        if graph.building_function and not runs_side_effects(graph, otherwise=False):
            graph.control_outputs.append(operation)

    def turn(self) -> Turn:
        """Returns a turn, for the sums of one call and of its gradient."""
        return Turn(self)

    def variable(self) -> tf.Tensor:
        """Returns the handle of the variable, created at first use."""
        # Not a `tf.Variable`, of which a strategy would create one for each of its replicas.
        if self._variable is None:
            with tf.init_scope(), tf.device("CPU:0"):
                handle = tf.raw_ops.VarHandleOp(
                    dtype=tf.int64, shape=[], shared_name=f"syncbn/order/{next(_numbers)}"
                )
                data = handle_data_util.create_handle_data(tf.TensorShape([]), tf.int64)
                handle_data_util.set_handle_data(handle, data)
                tf.raw_ops.AssignVariableOp(resource=handle, value=tf.zeros([], tf.int64))
            self._variable = handle
        return self._variable


class Turn:
    """The sums of one call and of its gradient, in an `Order`."""

    def __init__(self, order: Order):
        self._order = order
        self._handle: tf.Tensor | None = None
        self._around: _HandleAround | None = None
        self._witness: tf.Tensor | None = None

    def all_reduce_sum(
        self,
        add_up: Sum,
        tensor: tf.Tensor,
        name: str,
        handle: tf.Tensor | None = None,
        witness: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Returns ``add_up(tensor, name, ...)``, differentiable to any order."""

        @tf.custom_gradient
        def reduce(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            total, own = self._in_turn(add_up, tensor, name, handle, witness)
            if not tf.executing_eagerly():
                vectorized(total, again)
            return total, lambda upstream: self.all_reduce_sum(
                add_up, upstream, f"{name}/gradient", own, total
            )

        def again(rows: tf.Tensor) -> tf.Tensor:
            # In a turn of its own: the tensors of this one may be in another graph.
            return self._order.turn().all_reduce_sum(add_up, rows, name)

        return reduce(in_current_graph(tensor))

    def _in_turn(
        self,
        add_up: Sum,
        tensor: tf.Tensor,
        name: str,
        handle: tf.Tensor | None,
        witness: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns the sum, and the variable's handle that its gradient can take, if any."""
        inside = in_branch_or_loop()
        if tf.executing_eagerly() or not (self._order.everywhere or inside):
            return add_up(tensor, name, None), None
        known = self._handle if handle is None else handle
        if known is None:
            known = self._order.variable()
        elif known is self._handle and self._around is not None:
            outside = self._around.in_gradient()
            known = known if outside is None else outside
        with tf.control_dependencies(self._order.last()):
            begin = _touch(known)
        # The gradient can take the handle from this graph, but not from outside of all.
        own = begin.inputs[0] if inside else None
        if inside and self._handle is None:
            self._handle, self._around = own, _HandleAround(known)
        with tf.control_dependencies([begin]):
            total = add_up(tensor, name, self._witness if witness is None else witness)
        if self._witness is None:
            self._witness = total
        with tf.control_dependencies([total]):
            self._order.follow(_touch(begin.inputs[0]))
        return total, own


class _HandleAround:
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


def _touch(handle: tf.Tensor) -> tf.Operation:
    operation = tf.raw_ops.AssignAddVariableOp(resource=handle, value=tf.ones([], tf.int64))
    # A vectorized loop takes one turn for all iterations.
    convert_loops_with(operation, lambda loop: _touch(loop.unstacked_input(0)))
    return operation
