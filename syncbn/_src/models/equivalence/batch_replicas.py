"""Replicas to run a model on: several, or one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.autograph import unconverted
from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import require_agreement, sum_arrays
from syncbn._src.communicators.launcher import launched
from syncbn._src.communicators.resolution import resolve
from syncbn._src.keras_compat import keras_api


class BatchReplicas:
    """Replicas that share a batch: those of a strategy here, or the workers of a job, one each.

    Args:
        strategy: A strategy of this process; the default one for a single replica.
        sizes: The number of samples for each replica.
        communicator: The communicator of the workers, where each of them is one replica.
        device: Where to run, if the strategy does not decide that.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        sizes: Sequence[int],
        communicator: Communicator | None = None,
        device: str | None = None,
    ) -> None:
        self._strategy, self._communicator, self._device = strategy, communicator, device
        self._ends = [0, *np.cumsum(sizes)]

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Returns the scope in which to build models and assign weights."""
        with self._strategy.scope(), tf.device(self._device):
            yield

    def prepare(
        self, step: Callable[..., Any], data: Any, eager: bool = False
    ) -> Callable[[], list[Any]]:
        """Returns a function that runs ``step`` on all local replicas, each on its share.

        Args:
            step: Takes a part of ``data``, and returns a structure of tensors.
            data: A structure of arrays, the whole batch.
            eager: Whether to run it without a graph.

        Returns:
            A function that returns a structure of arrays from each of the local replicas.
        """

        def part(array: np.ndarray) -> Any:
            def value(context: Any) -> tf.Tensor:
                rank = self._rank(context.replica_id_in_sync_group)
                return tf.constant(array[self._ends[rank] : self._ends[rank + 1]])

            return self._strategy.experimental_distribute_values_from_function(value)

        @unconverted
        def on_replicas(data: Any) -> Any:
            return self._strategy.run(step, args=(data,))

        function = on_replicas if eager else tf.function(on_replicas)
        parts = tf.nest.map_structure(part, data)

        def run() -> list[Any]:
            with tf.device(self._device):
                results = function(parts)
            flat = [self._local(result) for result in tf.nest.flatten(results)]
            return [tf.nest.pack_sequence_as(results, one) for one in zip(*flat, strict=True)]

        return run

    def concatenate(self, parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Returns arrays of the whole batch, given those of each local replica."""
        arrays = [np.concatenate(part) for part in zip(*parts, strict=True)]
        if self._communicator is None:
            return arrays
        start, end = self._ends[self._rank(0) :][:2]
        rows = [np.zeros((self._ends[-1], *array.shape[1:]), array.dtype) for array in arrays]
        for row, array in zip(rows, arrays, strict=True):
            row[start:end] = array
        return sum_arrays(self._communicator, rows, "syncbn/equivalence")

    def add(self, parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Returns the sums over all replicas, given the arrays of each local one."""
        arrays = [np.sum(part, axis=0) for part in zip(*parts, strict=True)]
        if self._communicator is None:
            return arrays
        return sum_arrays(self._communicator, arrays, "syncbn/equivalence")

    def values(self, variables: Sequence[Any]) -> list[np.ndarray]:
        """Returns the values of variables: arrays ``(replicas, ...)``, those of each replica."""
        # The strategy knows those of TensorFlow.
        arrays = [np.stack(self._local(keras_api.variable(one))) for one in variables]
        if self._communicator is None:
            return arrays
        rows = [np.zeros((self._communicator.size, *a.shape[1:]), a.dtype) for a in arrays]
        for row, array in zip(rows, arrays, strict=True):
            row[self._rank(0)] = array[0]
        return sum_arrays(self._communicator, rows, "syncbn/equivalence")

    def any_worker(self, flag: bool) -> bool:
        """Says whether ``flag`` is true on any worker, so that all of them do the same."""
        if self._communicator is None:
            return flag
        (count,) = sum_arrays(self._communicator, [np.array([float(flag)])], "syncbn/equivalence")
        return bool(count[0])

    def _rank(self, replica: int) -> int:
        return replica if self._communicator is None else self._communicator.rank

    def _local(self, value: Any) -> list[np.ndarray]:
        arrays = [_array(one) for one in self._strategy.experimental_local_results(value)]
        # All numbers in float64, so that differences are not rounded once more.
        return [a.astype(np.float64) if a.dtype.kind not in "OSU" else a for a in arrays]


def comparison_replicas(
    sizes: Sequence[int], data: Any
) -> tuple[BatchReplicas, BatchReplicas, Communicator | None]:
    """Returns the replicas, the one with the whole batch, and the communicator of workers."""
    if tf.distribute.has_strategy():
        raise RuntimeError(
            "check_equivalence makes replicas of its own. Received: a call in the scope of "
            f"{type(tf.distribute.get_strategy()).__name__}. Call it outside."
        )
    if launched().variable == "TF_CONFIG":
        raise RuntimeError(
            "check_equivalence makes replicas in one process, or takes the workers of Horovod or "
            "MPI. Received: TF_CONFIG, with workers of tf.distribute. Run it in a process without."
        )
    samples, default = sum(sizes), tf.distribute.get_strategy()
    communicator = resolve()
    if communicator.size > 1:
        if communicator.size != len(sizes):
            raise ValueError(
                f"In a job, the replicas are its workers. Received: replicas={len(sizes)} in a job "
                f"of {communicator.size}."
            )
        digests = [_digest(array) for array in tf.nest.flatten(data)]
        parts = [f"part {number} of the batch" for number in range(len(digests))]
        require_agreement(communicator, digests, parts, "batches")
        return (
            BatchReplicas(default, sizes, communicator),
            BatchReplicas(default, [samples]),
            communicator,
        )
    names = devices(len(sizes))
    # Without TensorFlow's collectives, which mix up those of two strategies in one process.
    reduction = tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(names, cross_device_ops=reduction)
    return BatchReplicas(strategy, sizes), BatchReplicas(default, [samples], device=names[0]), None


def _digest(array: np.ndarray) -> str:
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {content}"


def devices(count: int) -> list[str]:
    """Returns ``count`` devices: GPUs, or logical devices of the CPU, created if possible."""
    if _logical("GPU") < count and _logical("CPU") < count:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * count
        try:
            tf.config.set_logical_device_configuration(cpu, parts)
        except RuntimeError as error:
            raise RuntimeError(
                f"{count} replicas need as many devices, and they cannot be made once TensorFlow "
                f"has started. Received: {_logical('GPU')} GPUs and {_logical('CPU')} CPU devices. "
                "Put this first in the program: tf.config.set_logical_device_configuration("
                "tf.config.list_physical_devices('CPU')[0], "
                f"[tf.config.LogicalDeviceConfiguration()] * {count})"
            ) from error
    kind = "GPU" if _logical("GPU") >= count else "CPU"
    return [f"{kind}:{number}" for number in range(count)]


def _logical(kind: str) -> int:
    """Returns the number of devices there are or will be, without initializing any."""
    physical = tf.config.get_visible_devices(kind)
    split = tf.config.get_logical_device_configuration
    return sum(len(split(device) or [None]) for device in physical)


def _array(value: Any) -> np.ndarray:
    return tf.convert_to_tensor(value).numpy()
