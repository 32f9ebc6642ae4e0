"""tf.distribute: MirroredStrategy, MultiWorkerMirroredStrategy, OneDeviceStrategy and their kin."""

from __future__ import annotations

import tensorflow as tf

from syncbn.communicators.tracing import refuse_xla


class DistributeCommunicator:
    """All replicas of the `tf.distribute.Strategy` in whose replica context the call is made."""

    name = "tf.distribute"
    supports_jit = False

    @property
    def size(self) -> int:
        return tf.distribute.get_strategy().num_replicas_in_sync

    @property
    def rank(self) -> int:
        identifier = _replica_context().replica_id_in_sync_group
        return identifier if isinstance(identifier, int) else tf.get_static_value(identifier)

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        context = _replica_context()
        if context.num_replicas_in_sync > 1:
            refuse_xla("tf.distribute")
        with tf.name_scope(name):
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def _replica_context() -> tf.distribute.ReplicaContext:
    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "A synchronized layer must be called in a replica context when training. "
            "Received: a call in the cross-replica context of "
            f"{type(tf.distribute.get_strategy()).__name__}. "
            "Call the model inside the function that is given to `strategy.run(...)`, "
            "or train with `model.fit`."
        )
    return context
