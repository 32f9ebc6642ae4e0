"""Replicas of a strategy that skip a step together in mixed precision, as Keras 3's do not.

Its `LossScaleOptimizer` looks for gradients that are not finite before it adds them up over the
replicas, and each replica, or the first one for all, decides by its own. Tried with Keras 3.10.0,
3.12.0, 3.14.1 and 3.15.1. tf_keras asks after the sum.
"""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat.keras_api import keras

_ASKS_ALL = "asks_all_replicas"


def mend_loss_scaling() -> tuple[str, ...]:
    """Replaces `LossScaleOptimizer.apply` of Keras 3, unless it has been; returns what it replaced.

    To try Keras' own first would take TensorFlow's operations, before a strategy may be created. In
    a Keras that asks all replicas by itself, they are asked twice.
    """
    apply = keras.optimizers.LossScaleOptimizer.apply
    if _ASKS_ALL in vars(apply):
        return ()

    @functools.wraps(apply)
    def apply_on_all_or_none(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            not_finite = tf.where(self.check_finite(grads), 0.0, 1.0)
            skip = replica.all_reduce(tf.distribute.ReduceOp.SUM, not_finite) > 0.0
            grads = _not_finite_where(skip, list(grads))
        apply(self, grads, trainable_variables)

    vars(apply_on_all_or_none)[_ASKS_ALL] = True
    keras.optimizers.LossScaleOptimizer.apply = apply_on_all_or_none
    return ("LossScaleOptimizer.apply",)


def _not_finite_where(skip: tf.Tensor, grads: list[Any]) -> list[Any]:
    """Makes one of the gradients NaN: a dense one, since a sparse one may have no rows."""
    given = [index for index, gradient in enumerate(grads) if gradient is not None]
    given.sort(key=lambda index: isinstance(grads[index], tf.IndexedSlices))
    for index in given[:1]:
        gradient = tf.convert_to_tensor(grads[index])
        grads[index] = tf.where(skip, tf.cast(float("nan"), gradient.dtype), gradient)
    return grads
