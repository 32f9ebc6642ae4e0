"""tf.distribute: MirroredStrategy, MultiWorkerMirroredStrategy, OneDeviceStrategy and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn.communicators.tracing import in_vectorized_loop, refuse_forward_mode, refuse_xla


class DistributeCommunicator:
    """The replicas of the `tf.distribute.Strategy` in whose replica context a call is made."""

    name = "tf.distribute"
    supports_jit = False

    def split(self, groups: Sequence[Sequence[int]]) -> DistributeGroups:
        """Returns what adds up within groups of the replicas."""
        return DistributeGroups(self, groups)

    def hosts(self) -> list[str]:
        """Returns the host of each replica, as the strategy's cluster names it."""
        strategy = tf.distribute.get_strategy()
        resolver = strategy.cluster_resolver
        cluster = resolver.cluster_spec().as_dict() if resolver else {}
        tasks = [*cluster.get("chief", []), *cluster.get("worker", [])] or ["localhost"]
        replicas = strategy.num_replicas_in_sync // len(tasks)
        return [task.rpartition(":")[0] for task in tasks for _ in range(replicas)]

    @property
    def size(self) -> int:
        return tf.distribute.get_strategy().num_replicas_in_sync

    @property
    def rank(self) -> int:
        identifier = _replica_context().replica_id_in_sync_group
        return identifier if isinstance(identifier, int) else tf.get_static_value(identifier)

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        context = _replica_context()
        if context.num_replicas_in_sync == 1:
            return tensor
        refuse_xla("tf.distribute")
        refuse_forward_mode("tf.distribute", tensor)
        if in_vectorized_loop():
            # It would be vectorized for this replica only, with the first iteration of the others.
            raise NotImplementedError(
                "TensorFlow cannot vectorize a collective of tf.distribute. Received: a training "
                "call, or its gradient, inside of `tf.vectorized_map` or of a tape's `jacobian` or "
                "`batch_jacobian`. Take gradients one by one, or use Horovod or MPI."
            )
        with tf.name_scope(name):
            return _all_reduce_sum(tensor)


class DistributeGroups:
    """Groups of the replicas of a strategy, which has no collective for a part of them.

    One collective over all replicas does instead, in which each group has a row of its own.
    """

    def __init__(self, communicator: DistributeCommunicator, groups: Sequence[Sequence[int]]):
        self._communicator = communicator
        self._groups = len(groups)
        members = {rank: group for group, ranks in enumerate(groups) for rank in ranks}
        self._group_of = [members[rank] for rank in range(len(members))]

    def own(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns the row of this replica's group."""
        # By a slice: the gradient of `tf.gather` is no tensor, which custom gradients want.
        return rows[self._own_group()]

    def all_reduce_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns the sums of ``tensor`` over each of the groups, as rows."""
        own = tf.range(self._groups) == self._own_group()
        own = tf.reshape(own, [-1, *[1] * tensor.shape.rank])
        # Not a product: zero times a NaN of this group would be one in the others' rows.
        rows = tf.where(own, tensor, tf.zeros([], tensor.dtype))
        return self._communicator.all_reduce_sum(rows, name)

    def _own_group(self) -> tf.Tensor:
        return tf.gather(self._group_of, _replica_context().replica_id_in_sync_group)


def _shares_one_memory(strategy: tf.distribute.Strategy) -> bool:
    """Says whether all replicas are on the CPUs of this process.

    Then one addition, whose result all of them read, does what a collective does, in a small part
    of the time (two replicas, 129 numbers, on two cores: 0.005 ms against 0.15 ms).
    """
    devices = strategy.extended.worker_devices
    return len(devices) == strategy.num_replicas_in_sync and all(
        tf.DeviceSpec.from_string(device).device_type == "CPU" for device in devices
    )


@tf.custom_gradient
def _all_reduce_sum(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    # What comes back has a custom gradient already. The custom gradient of a layer, which walks the
    # graph from its results to its inputs, must not walk on into the other replicas from here.
    def add_up(strategy: tf.distribute.Strategy, tensors: Any) -> tf.Tensor:
        total = tf.add_n(strategy.experimental_local_results(tensors), name="all_reduce_sum")
        return tf.stop_gradient(total)

    context = tf.distribute.get_replica_context()
    if _shares_one_memory(context.strategy):
        return context.merge_call(add_up, args=[tensor]), _all_reduce_sum
    # An argument of a function has no device, without which TensorFlow finds no destination; a copy
    # made here has the replica's.
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(tensor))
    return tf.stop_gradient(total), _all_reduce_sum


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
