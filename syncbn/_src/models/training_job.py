"""The job that trains a model: its replicas, as seen from outside of a training step."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator, process_communicator
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.communicators.local import LocalCommunicator
from syncbn._src.communicators.nested import NestedCommunicator
from syncbn._src.communicators.resolution import check_communicator, resolve
from syncbn._src.communicators.tf_distribute import DistributeCommunicator
from syncbn._src.keras_compat import keras_api

_CHAIN, _TIMES = 20, 15


class TrainingJob:
    """The replicas of a communicator, some of which are in this process.

    Args:
        communicator: The communicator of the replicas.
        strategy: The strategy whose replicas the communicator joins, if it does. Otherwise this
            process is one replica.

    Raises:
        ValueError: processes have different numbers of replicas.
    """

    def __init__(self, communicator: Any, strategy: Any = None):
        self.communicator = communicator
        self.strategy = strategy
        if strategy is None:
            self.size, self.ranks = communicator.size, [communicator.rank]
            return
        with strategy.scope():
            self.size, self.ranks = communicator.size, communicator.ranks
            if isinstance(communicator, NestedCommunicator):
                communicator.require_equal_processes()

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the scope of the strategy, or one that does nothing."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def copies(self, weight: Any) -> list[Any]:
        """Returns the variables that hold a weight of Keras on each of this process's replicas."""
        variable = keras_api.variable(weight)
        if self.strategy is None:
            return [variable]
        found = self.strategy.experimental_local_results(variable)
        return list(found) if len(found) == len(self.ranks) else [variable] * len(self.ranks)

    def run(
        self, function: Callable[[tf.Tensor], Any], values: Sequence[np.ndarray]
    ) -> list[list[np.ndarray]]:
        """Runs ``function``, in a graph, on each of this process's replicas. All workers call it.

        Args:
            function: Returns a tensor, or several.
            values: Its argument on each of them.

        Returns:
            The tensors of each of them, in a list.
        """
        return self._results(self._compiled(function), values)

    def _results(
        self, function: Callable[..., Any], values: Sequence[np.ndarray]
    ) -> list[list[np.ndarray]]:
        outputs = function(*self._inputs(values))
        flat = [self._local(output) for output in tf.nest.flatten(outputs)]
        return [[tensor.numpy() for tensor in own] for own in zip(*flat, strict=True)]

    def gather(self, vectors: Sequence[np.ndarray], name: str) -> np.ndarray:
        """Returns the vectors of all replicas as rows, float64, in one collective.

        Args:
            vectors: One for each of this process's replicas, all of one length.
            name: The name of the collective.
        """
        if self.strategy is None:
            return all_gather(self.communicator, vectors[0], name)
        own = np.zeros((len(self.ranks), self.size, len(vectors[0])))
        for rows, rank, vector in zip(own, self.ranks, vectors, strict=True):
            rows[rank] = vector
        return self.run(lambda rows: self.communicator.all_reduce_sum(rows, name), list(own))[0][0]

    def workers(self) -> Communicator:
        """Returns the communicator of the job's processes, for eager calls outside of replicas."""
        if self.strategy is None or isinstance(self.communicator, NestedCommunicator):
            return process_communicator(self.communicator)
        return LocalCommunicator() if len(self.ranks) == self.size else _Workers(self)

    def latency(self, elements: int, dtype: Any) -> float:
        """Measures how long one all-reduce takes, in seconds. All workers make the call.

        It is the median over runs of a graph in which each all-reduce waits for the one before.
        """

        def chain(value: tf.Tensor) -> tf.Tensor:
            for number in range(_CHAIN):
                value = self.communicator.all_reduce_sum(value, f"syncbn/latency/{number}")
                value /= self.size
            return value

        values = [np.ones(elements, tf.as_dtype(dtype).as_numpy_dtype) for _ in self.ranks]
        function, inputs = self._compiled(chain), self._inputs(values)
        seconds = []
        for _ in range(_TIMES + 1):
            start = time.perf_counter()
            self._local(function(*inputs))[0].numpy()
            seconds.append((time.perf_counter() - start) / _CHAIN)
        return statistics.median(seconds[1:])  # the first traced the graph

    def _compiled(self, function: Callable[[tf.Tensor], Any]) -> Callable[..., Any]:
        if self.strategy is None:
            return tf.function(function, autograph=False)
        return tf.function(
            lambda *inputs: self.strategy.run(function, args=inputs), autograph=False
        )

    def _inputs(self, values: Sequence[np.ndarray]) -> list[Any]:
        if self.strategy is None:
            return [tf.constant(values[0])]
        # A strategy of several workers numbers its replicas over all workers.
        return [
            self.strategy.experimental_distribute_values_from_function(
                lambda c: tf.constant(values[c.replica_id_in_sync_group % len(values)])
            )
        ]

    def _local(self, output: Any) -> Sequence[tf.Tensor]:
        return (
            [output] if self.strategy is None else self.strategy.experimental_local_results(output)
        )


class _Workers:
    """The workers of a strategy; the first replica of each acts for it."""

    name = "tf.distribute"
    supports_jit = False
    finds_mixups = True

    def __init__(self, job: TrainingJob):
        self._job = job
        self.size = job.size // len(job.ranks)
        self.rank = job.ranks[0] // len(job.ranks)
        self._sums: dict[Any, Callable[..., Any]] = {}
        """Compiled, as some are asked for again and again: by name, dtype and shape."""

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        values = [tensor.numpy() * (number == 0) for number in range(len(self._job.ranks))]
        add_up = self._job.communicator.all_reduce_sum
        call = name, tensor.dtype, tuple(tensor.shape)
        if call not in self._sums:
            self._sums[call] = self._job._compiled(lambda value: add_up(value, name))
        return tf.constant(self._job._results(self._sums[call], values)[0][0])


def job_of(model: Any, communicator: str | Communicator = "auto") -> TrainingJob:
    """Returns the job of a model: ``"auto"`` is first of all the strategy that it was built under.

    Raises:
        RuntimeError: the call is made inside of a graph or of a replica.
        ValueError, TypeError, ImportError, RuntimeError: see `syncbn.resolve`.
    """
    check_communicator(communicator)
    in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
    if in_replica or not tf.executing_eagerly():
        raise RuntimeError(
            "A function about the replicas of a model must be called eagerly and outside of them, "
            "between steps. Received: a call inside a tf.function, a graph or strategy.run."
        )
    weights = model.weights if model.built else []
    strategies = (getattr(keras_api.variable(w), "distribute_strategy", None) for w in weights)
    strategy = next(filter(None, strategies), tf.distribute.get_strategy())
    with strategy.scope():
        resolved = resolve(communicator)
    of_strategy = isinstance(resolved, DistributeCommunicator | NestedCommunicator)
    several = strategy.num_replicas_in_sync > 1
    return TrainingJob(resolved, strategy if of_strategy and several else None)
