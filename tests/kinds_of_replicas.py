"""Replicas of every kind, behind one interface, so that one suite can run on all of them.

``build(make, shape)`` makes the layers, ``run(step, layers, arguments, graph)`` runs one step on
each replica and returns the results of those that live in this process, by rank, as NumPy arrays.
After a run in a graph, ``operations`` are those of that graph, of all local replicas; those of a
strategy or a process can run a graph several ``times``, and return the results of each.
"""

from __future__ import annotations

import contextlib
import functools
import threading

import numpy as np
import tensorflow as tf

import syncbn
from tests import patience
from tests.keras import KERAS_3


class Threads:
    """Replicas that are threads: a communicator of a user's own making, and a fast one."""

    separate = True

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=patience.limit())
        self._slots = [None] * size
        self._parts = {}
        self._lock = threading.Lock()

    def part(self, ranks):
        """Some of the replicas, which are the same object whoever asks."""
        with self._lock:
            return self._parts.setdefault(ranks, Threads(len(ranks)))

    def communicator(self, rank):
        return ThreadCommunicator(self, rank)

    def build(self, make, shape):
        layers = [make(rank) for rank in range(self.size)]
        for layer in layers:
            # Processes would each count their layers from one.
            setattr(layer, "name" if KERAS_3 else "_name", "layer")
            layer.build(shape)
        return layers

    def run(self, step, layers, arguments, graph=False):
        results, errors = {}, []

        def replica(rank):
            try:
                # Never as a graph: its operations wait in TensorFlow's own threads, of which there
                # may be fewer than replicas.
                results[rank] = _to_numpy(step(layers[rank], *arguments[rank]))
            except threading.BrokenBarrierError:
                pass  # another replica failed, and says why
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=replica, args=[rank]) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._barrier.reset()
        if errors:
            raise errors[0]
        return results

    def moving(self, layers):
        self._moving = [
            {name: getattr(layer, name).numpy() for name in _statistics(layer)} for layer in layers
        ]
        return {
            name: {rank: moving[name] for rank, moving in enumerate(self._moving)}
            for name in self._moving[0]
        }

    def total(self, value):
        # All of them are here, so that they can be compared with one another.
        for name, first in self._moving[0].items():
            assert all(np.array_equal(first, moving[name]) for moving in self._moving), name
        return self.size * value


class ThreadCommunicator:
    name = "local"
    supports_jit = False

    def __init__(self, replicas, rank):
        self._replicas, self.rank, self.size = replicas, rank, replicas.size
        self.payloads = []

    def split(self, groups):
        own = next(tuple(ranks) for ranks in groups if self.rank in ranks)
        return ThreadCommunicator(self._replicas.part(own), own.index(self.rank))

    def all_reduce_sum(self, tensor, name):
        def reduce(value):
            slots, barrier = self._replicas._slots, self._replicas._barrier
            slots[self.rank] = value
            barrier.wait()
            total = np.sum(slots, axis=0, dtype=value.dtype)
            barrier.wait()
            return total

        self.payloads.append(tensor.shape.num_elements())
        total = tf.numpy_function(reduce, [tensor], tensor.dtype)
        total.set_shape(tensor.shape)
        return total


class Strategy:
    """The replicas of a tf.distribute strategy, in this process and maybe in others."""

    separate = False
    first = 0
    """The rank of what the strategy counts as its replica 0."""
    processes = 1
    """Over how many an optimizer averages what it has added up over a strategy."""

    def __init__(self, strategy):
        self.strategy = strategy
        self.size = strategy.num_replicas_in_sync
        self.local_size = len(strategy.extended.worker_devices)

    def communicator(self, rank):
        return "auto"

    def build(self, make, shape):
        with self.strategy.scope():
            layer = make(None)
            layer.build(shape)
        return [layer]

    def run(self, step, layers, arguments, graph=False, times=None):
        (layer,) = layers

        def distributed(index):
            return self.strategy.experimental_distribute_values_from_function(
                lambda context: tf.convert_to_tensor(
                    arguments[self.first + context.replica_id_in_sync_group][index]
                )
            )

        inputs = [
            None if argument is None else distributed(index)
            for index, argument in enumerate(arguments[0])
        ]

        def replica(*inputs):
            rank = tf.distribute.get_replica_context().replica_id_in_sync_group
            return tf.convert_to_tensor(rank), step(layer, *inputs)

        def run(*inputs):
            return self.strategy.run(replica, args=inputs)

        function = tf.function(run)

        def results():
            outputs = (function if graph else run)(*inputs)
            local = zip(
                *(self.strategy.experimental_local_results(o) for o in tf.nest.flatten(outputs)),
                strict=True,
            )
            found = (tf.nest.pack_sequence_as(outputs, flat) for flat in local)
            return {self.first + int(rank): _to_numpy(result) for rank, result in found}

        found = results() if times is None else [results() for _ in range(times)]
        if graph:
            self.operations = function.get_concrete_function(*inputs).graph.get_operations()
        return found

    def moving(self, layers):
        (layer,) = layers
        self._moving_values = {
            name: dict(enumerate(_local_values(self.strategy, getattr(layer, name)), self.first))
            for name in _statistics(layer)
        }
        return self._moving_values

    def total(self, value):
        if self.local_size == self.size:
            values = self._moving_values
            assert all(np.array_equal(values[n][0], v) for n in values for v in values[n].values())
            return self.size * value

        def reduce():
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(value))

        return self.strategy.experimental_local_results(self.strategy.run(reduce))[0].numpy()


class Nested(Strategy):
    """The replicas of a strategy in each of several processes that an engine joins."""

    def __init__(self, strategy, process):
        super().__init__(strategy)
        self.process, self.processes = process, process.size
        self.size = self.local_size * process.size
        self.first = self.local_size * process.rank

    def total(self, value):
        values = self._moving_values
        assert all(
            np.array_equal(values[n][self.first], v) for n in values for v in values[n].values()
        )
        return self.local_size * self.process.total(value)


class Process:
    """This process is one replica; an engine joins it to the others."""

    separate = True

    def __init__(self, rank, size, process_sets=()):
        self.rank, self.size, self.local_size = rank, size, 1
        self.process_sets = process_sets

    def communicator(self, rank):
        return "auto"

    def build(self, make, shape):
        layer = make(self.rank)
        layer.build(shape)
        return [layer]

    def run(self, step, layers, arguments, graph=False, times=None):
        step = functools.partial(step, layers[0])
        function = tf.function(step)
        own = arguments[self.rank]

        def results():
            return {self.rank: _to_numpy((function if graph else step)(*own))}

        found = results() if times is None else [results() for _ in range(times)]
        if graph:
            self.operations = function.get_concrete_function(*own).graph.get_operations()
        return found

    def moving(self, layers):
        return {
            name: {self.rank: getattr(layers[0], name).numpy()} for name in _statistics(layers[0])
        }

    def total(self, value):
        return syncbn.resolve().all_reduce_sum(tf.constant(value), "total").numpy()


def mirrored(size):
    return Strategy(tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(size)]))


def nested(size, process):
    """The replicas of a MirroredStrategy in each process of a job."""
    # Without the tuning of data pipelines, which has many threads and takes long to end.
    tf.data.experimental.enable_debug_mode()
    return Nested(mirrored(size).strategy, process)


def multiworker():
    """The workers of the cluster that ``TF_CONFIG`` describes; this process is one of them."""
    return Strategy(tf.distribute.MultiWorkerMirroredStrategy())


def use_logical_devices(count):
    """Splits the CPU; must come before anything that runs on it."""
    with contextlib.suppress(RuntimeError):
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * count,
        )
    assert len(tf.config.list_logical_devices("CPU")) >= count, "TensorFlow has started before"


def _local_values(strategy, variable):
    value = getattr(variable, "value", variable)
    value = value if isinstance(value, tf.Variable) or not callable(value) else variable
    return [v.numpy() for v in strategy.experimental_local_results(value)]


def _statistics(layer):
    moving = ("moving_mean", "moving_variance", "moving_count", "moving_stddev")
    names = (*moving, "renorm_mean", "renorm_stddev")
    return [name for name in names if getattr(layer, name, None) is not None]


def _to_numpy(structure):
    return tf.nest.map_structure(lambda v: tf.convert_to_tensor(v).numpy(), structure)
