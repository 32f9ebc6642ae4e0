"""Gradients of several backward passes, summed before workers exchange them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import wire_dtype
from syncbn._src.keras_compat import keras_api
from syncbn._src.ops.graphs import in_session
from syncbn._src.training.gradient_averages import Gradient


class Accumulation:
    """Sums gradients on this worker, and passes on the sums once in several calls.

    Sums that have not been passed on yet are not saved.

    Args:
        passes: The number of calls.
        mean: Whether to pass on means.
    """

    def __init__(self, passes: int, mean: bool):
        self.passes, self.mean = passes, mean
        self._sums: list[_DenseSum | _SparseSum | None] = []
        self._variables: list[Any] = []
        self._count: Any = None

    def add(
        self,
        gradients: Sequence[Gradient],
        variables: Sequence[Any],
        apply: Callable[[list[Gradient]], Any],
    ) -> None:
        """Adds gradients to the sums, and at every ``passes``-th call passes these to ``apply``.

        Args:
            gradients: Those of the same variables at each call, in the same order.
            variables: What they are gradients of.
            apply: Traced into a branch where the call is made in a graph. What it returns is
                dropped.

        Raises:
            ValueError: other gradients than at the first call, or those of other variables.
            NotImplementedError: a strategy has several replicas, or in a graph could have, which
                cannot communicate in a branch; or the graph is that of a session.
        """
        self._prepare(gradients, variables)
        for total, gradient in zip(self._sums, gradients, strict=True):
            if total is not None:
                total.add(gradient)

        def hand_on() -> tf.Tensor:
            divisor = self.passes if self.mean else 1
            totals = [None if total is None else total.take(divisor) for total in self._sums]
            self._count.assign(0)
            apply(totals)
            return tf.constant(True)

        full = self._count.assign_add(1) >= self.passes
        tf.cond(full, hand_on, lambda: tf.constant(False))

    def clear(self) -> None:
        """Forgets the sums that have not been passed on."""
        if self._count is not None:
            self._count.assign(0)
        for total in self._sums:
            if total is not None:
                total.take(1)

    def _prepare(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> None:
        strategy = tf.distribute.get_strategy()
        if strategy.num_replicas_in_sync > 1:
            raise NotImplementedError(
                "backward_passes_per_step needs one replica in each process, since replicas of "
                "tf.distribute cannot communicate in branches. Received: a strategy with "
                f"{strategy.num_replicas_in_sync} replicas. Add up the losses "
                "of several batches in one step instead."
            )
        alone = isinstance(strategy, tf.distribute.OneDeviceStrategy)
        if tf.distribute.has_strategy() and not alone and not tf.executing_eagerly():
            raise NotImplementedError(
                "In a graph, backward_passes_per_step needs a step outside of strategies, or in a "
                "OneDeviceStrategy, since in others no optimizer can apply in a branch. Received: "
                f"{type(strategy).__name__} with one replica. Leave the strategy out."
            )
        if in_session():
            raise NotImplementedError(
                "backward_passes_per_step needs variables that are assigned at once. Received: the "
                "graph of a session. Add up the losses of several batches in one step instead."
            )
        kinds = [_kind(gradient) for gradient in gradients]
        variables = [keras_api.variable(variable) for variable in variables]
        if self._count is None:
            with tf.init_scope():
                self._count = tf.Variable(0, dtype=tf.int64, trainable=False)
                self._sums = [
                    None if kind is None else kind(variable.shape, gradient)
                    for kind, gradient, variable in zip(kinds, gradients, variables, strict=True)
                ]
                self._variables = variables
        known = [None if total is None else type(total) for total in self._sums]
        if kinds != known:
            first = next(
                (n for n, (a, b) in enumerate(zip(kinds, known, strict=False)) if a is not b),
                min(len(kinds), len(known)),
            )
            raise ValueError(
                "With backward_passes_per_step, all passes must have the same gradients. Received: "
                f"{len(kinds)} of them, after {len(known)} in the first pass; the first that is "
                f"dense, sparse or missing where it was not is number {first}."
            )
        for number, (one, before) in enumerate(zip(variables, self._variables, strict=True)):
            if one is not before:
                raise ValueError(
                    "With backward_passes_per_step, all passes must have gradients of the same "
                    f"variables, in the same order. Received: as number {number} one of "
                    f"{one.name}, after one of {before.name} in the first pass. Give each list of "
                    "variables an optimizer of its own."
                )


class _DenseSum:
    def __init__(self, shape: tf.TensorShape, like: tf.Tensor):
        self._dtype = like.dtype
        self._sum = tf.Variable(tf.zeros(shape, wire_dtype(like.dtype)), trainable=False)

    def add(self, gradient: tf.Tensor) -> None:
        self._sum.assign_add(tf.cast(gradient, self._sum.dtype))

    def take(self, divisor: int) -> tf.Tensor:
        """Returns the sum, divided, and resets it."""
        total = tf.identity(self._sum)
        with tf.control_dependencies([total]):
            self._sum.assign(tf.zeros_like(total))
        # In 16 bits a sum can overflow where the mean does not.
        return tf.cast(total / divisor, self._dtype)


class _SparseSum:
    """A table, and which of its rows are in the sum: a sparse gradient stays sparse."""

    def __init__(self, shape: tf.TensorShape, like: tf.IndexedSlices):
        self._dtype, self._indices_dtype, self._shape = like.dtype, like.indices.dtype, shape
        self._table = tf.Variable(tf.zeros(shape, wire_dtype(like.dtype)), trainable=False)
        self._touched = tf.Variable(tf.zeros(shape[:1], tf.bool), trainable=False)

    def add(self, gradient: tf.IndexedSlices) -> None:
        values = tf.cast(gradient.values, self._table.dtype)
        self._table.scatter_add(tf.IndexedSlices(values, gradient.indices))
        rows = tf.ones_like(gradient.indices, tf.bool)
        self._touched.scatter_update(tf.IndexedSlices(rows, gradient.indices))

    def take(self, divisor: int) -> tf.IndexedSlices:
        """Returns the sum, divided, each row once, and resets it."""
        indices = tf.where(self._touched)[:, 0]
        values = tf.gather(self._table, indices)
        with tf.control_dependencies([values]):
            self._table.scatter_update(tf.IndexedSlices(tf.zeros_like(values), indices))
            self._touched.assign(tf.zeros_like(self._touched))
        return tf.IndexedSlices(
            tf.cast(values / divisor, self._dtype),
            tf.cast(indices, self._indices_dtype),
            tf.constant(self._shape.as_list(), self._indices_dtype),
        )


def _kind(gradient: Gradient) -> type[_DenseSum] | type[_SparseSum] | None:
    if gradient is None:
        return None
    return _SparseSum if isinstance(gradient, tf.IndexedSlices) else _DenseSum
