"""The strategy in whose scope or replica a call is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator


def replica_context() -> tf.distribute.ReplicaContext:
    """Returns the context of the replica that makes the call.

    Raises:
        RuntimeError: the call is not made in a replica context.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise outside_of_replicas("A sum over replicas must be made in a replica context.")
    return context


def outside_of_replicas(requirement: str) -> RuntimeError:
    """Returns the error of a call in a cross-replica context that does not meet a requirement."""
    return RuntimeError(
        f"{requirement} Received: a call in the cross-replica context of "
        f"{type(tf.distribute.get_strategy()).__name__}. Make it inside the function that is given "
        "to `strategy.run(...)`, or train with `model.fit`."
    )


def replica_number() -> int:
    """Returns the number of the replica that makes the call."""
    number = replica_context().replica_id_in_sync_group
    static = number if isinstance(number, int) else tf.get_static_value(number)
    return number if static is None else int(static)


def local_replicas() -> int:
    """Returns the number of replicas that the strategy has in this process."""
    strategy = tf.distribute.get_strategy()
    # The default strategy has one, and no devices of its own.
    return len(strategy.extended.worker_devices) if strategy.num_replicas_in_sync > 1 else 1


def joined_processes() -> int:
    """Returns the number of processes that the strategy joins; 1 if only this one."""
    return tf.distribute.get_strategy().num_replicas_in_sync // local_replicas()


def cluster_workers() -> dict[tuple[str, int], str]:
    """Returns the hosts of the strategy's workers, the chief first, by their tasks."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    cluster = resolver.cluster_spec() if resolver else tf.train.ClusterSpec({})
    return {
        (job, number): cluster.task_address(job, number).rpartition(":")[0]
        for job in ("chief", "worker")
        if job in cluster.jobs
        for number in cluster.task_indices(job)
    }


def require_same_calls(strategy: tf.distribute.Strategy, tensors: Any, names: Any) -> Any:
    """Returns the tensors of the replicas, in a merge call to which each has given a name too.

    Raises:
        RuntimeError: the replicas make different calls, and have come to the same place.
    """
    parts = strategy.experimental_local_results(tensors)
    names = strategy.experimental_local_results(names)
    if len(names) == 1:  # which is the same on all of them
        names = names * len(parts)
    calls = [
        f"{name}, {part.dtype.name} {part.shape}" for name, part in zip(names, parts, strict=True)
    ]
    first = parts[0]
    if len(set(names)) > 1 or not all(
        part.dtype == first.dtype and part.shape.is_compatible_with(first.shape) for part in parts
    ):
        raise RuntimeError(
            "All replicas must make the same calls in the same order. Received: "
            + "; ".join(f"on replica {number} {call}" for number, call in enumerate(calls))
            + ". Make the same training calls on every replica, whatever its number is."
        )
    return parts


class GroupRows:
    """Groups of replicas without collectives of their own.

    They share one collective over all replicas, in which each group has a row of its own.

    Args:
        communicator: The communicator of all replicas.
        groups: The ranks of each group.
    """

    def __init__(self, communicator: Communicator, groups: Sequence[Sequence[int]]):
        self._communicator = communicator
        self._groups = len(groups)
        members = {rank: group for group, ranks in enumerate(groups) for rank in ranks}
        self._group_of = [members[rank] for rank in range(len(members))]

    def own(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns the row of this replica's group."""
        # A slice, as the gradient of `tf.gather` is not a tensor, which custom gradients need.
        return rows[self._own_group()]

    def all_reduce_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns the sums of ``tensor`` over each of the groups, as rows."""
        own = tf.range(self._groups) == self._own_group()
        own = tf.reshape(own, [-1, *[1] * tensor.shape.rank])
        # Not a product: zero times a NaN of this group would be NaN in the others' rows.
        rows = tf.where(own, tensor, tf.zeros([], tensor.dtype))
        return self._communicator.all_reduce_sum(rows, name)

    def _own_group(self) -> tf.Tensor:
        return tf.gather(self._group_of, self._communicator.rank)
