"""Two levels: the replicas of a strategy in each of several processes that an engine joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import require_agreement
from syncbn._src.communicators.strategy import (
    GroupRows,
    local_replicas,
    replica_context,
    replica_number,
    require_same_calls,
)
from syncbn._src.communicators.tracing import refuse_transformations
from syncbn._src.ops.vectorization import refused


class NestedCommunicator:
    """The replicas of all processes, those of a strategy in each. Called in its replica context.

    A process sums over its replicas, and takes part in one collective of the processes. Sums are
    right for any number of replicas in each process; `size` and `rank` assume equal numbers.

    Args:
        across: The communicator of the processes.
    """

    supports_jit = False
    finds_mixups = True

    def __init__(self, across: Communicator):
        self.across = across
        self.name = across.name

    @property
    def size(self) -> int:
        return self.across.size * local_replicas()

    @property
    def ranks(self) -> list[int]:
        """The ranks of this process's replicas, for calls outside of them."""
        local = local_replicas()
        return [self.across.rank * local + number for number in range(local)]

    @property
    def rank(self) -> int:
        # A strategy of several workers numbers its replicas over all workers.
        local = local_replicas()
        return self.across.rank * local + replica_number() % local

    def split(self, groups: Sequence[Sequence[int]]) -> GroupRows:
        """Returns the groups, with all-reduces within each. A collective call.

        Raises:
            ValueError: processes have different numbers of replicas.
            NotImplementedError: the call is made in the graph of a session.
        """
        self.require_equal_processes()
        return GroupRows(self, groups)

    def require_equal_processes(self) -> None:
        """Raises where replicas have no well-defined ranks. A collective call of the processes.

        Raises:
            ValueError: processes have different numbers of replicas.
            NotImplementedError: the call is made in the graph of a session.
        """
        with tf.init_scope():
            if not tf.executing_eagerly():
                raise NotImplementedError(
                    "Processes can only compare their numbers of replicas where TensorFlow runs "
                    "eagerly. Received: the graph of a session. Use layers without groups there."
                )
            require_agreement(
                self.across, [str(local_replicas())], ["the number"], "numbers of replicas"
            )

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        context = replica_context()
        engines = f"{self.name} and tf.distribute"
        refuse_transformations(engines, tensor)

        def add_up(strategy: tf.distribute.Strategy, tensors: Any, names: Any) -> tf.Tensor:
            with tf.device(strategy.extended.worker_devices[0]):
                own = tf.add_n(require_same_calls(strategy, tensors, names))
            # The gradient stops here: that of the sum over all replicas is below.
            return tf.stop_gradient(self.across.all_reduce_sum(own, name))

        @tf.custom_gradient
        def reduce(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return self.all_reduce_sum(upstream, f"{name}/gradient")

            return context.merge_call(add_up, args=[refused(tensor, engines), name]), gradient

        return reduce(tensor)
