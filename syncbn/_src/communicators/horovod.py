"""Horovod: the processes of a `horovodrun` or `mpirun` job, or those of a process set."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators import horovod_settings
from syncbn._src.communicators.base import AddUp, wire_dtype
from syncbn._src.communicators.horovod_errors import (
    lost_collectives_as_internal_errors,
    note_collective,
)
from syncbn._src.communicators.horovod_names import EagerCalls, operation_name
from syncbn._src.communicators.launcher import is_elastic, require_whole_job
from syncbn._src.communicators.order import Order, Turn
from syncbn._src.communicators.tracing import refuse_transformations, refuse_xla
from syncbn._src.ops.graphs import in_session
from syncbn._src.watchdog.flight_recorder import RECORDER
from syncbn._src.watchdog.watchdog import WatchedJob, to_array, to_bytes, watch_job


class HorovodCommunicator:
    """All Horovod processes, or those of one process set.

    Where Horovod's default settings make small messages slow, rank 0 logs that once (see
    `syncbn.training.init_horovod`).

    Args:
        process_set: A `horovod.tensorflow.ProcessSet` that this process belongs to, or ``None``
            for all processes.

    Raises:
        ImportError: Horovod with TensorFlow support is not installed.
        RuntimeError: Horovod is not initialized, or runs with one process while the launcher
            started several.
        ValueError: this process does not belong to ``process_set``.
        NotImplementedError: a process set in an elastic job, which ends with each change of size.

    Example:
        In a job of two processes, after `syncbn.training.init_horovod`:

        >>> syncbn.HorovodCommunicator().size
        2
    """

    name = "horovod"
    supports_jit = False
    finds_mixups = True  # as calls meet by their names

    def __init__(self, process_set: Any = None):
        hvd = import_horovod()
        if not hvd.is_initialized():
            raise RuntimeError(
                "communicator='horovod' needs Horovod to be initialized. Received: a process in "
                "which it is not. Call hvd.init() before the first training step."
            )
        self.resizable = is_elastic()
        if not self.resizable:  # an elastic job may have come down to one process
            require_whole_job(
                "Horovod", hvd.size(), "Start the job with horovodrun, or build Horovod with MPI."
            )
        self._hvd = hvd
        # Horovod matches the processes' calls by the name of the operation, which must not run
        # concurrently with itself, as it might in the iterations of a loop. Different operations
        # may.
        self._orders: defaultdict[str, Order] = defaultdict(lambda: Order(everywhere=False))
        self._eager_calls = EagerCalls()
        self._process_set = hvd.global_process_set if process_set is None else process_set
        if self.resizable and self._process_set is not hvd.global_process_set:
            raise NotImplementedError(
                "Process sets end with each change of the job's size. Received: "
                f"{self._process_set} in an elastic job. Use all processes, or a job of fixed size."
            )
        if not self._process_set.included():
            raise ValueError(
                "A process can only use a process set that it belongs to. Received: "
                f"{self._process_set} on rank {hvd.rank()}. Give each process its own set."
            )
        ranks = self._process_set.ranks
        everyone = ranks is None or len(ranks) == hvd.size() or self.resizable
        self._members = None if everyone else tuple(ranks)
        if hvd.size() > 1 and hvd.rank() == 0:
            horovod_settings.advise_once()

    @property
    def size(self) -> int:
        return self._process_set.size()

    @property
    def rank(self) -> int:
        return self._process_set.rank()

    def current_size(self) -> tf.Tensor:
        """Returns the size of an elastic job, which a graph reads whenever it runs."""
        with tf.device("CPU:0"):
            return self._hvd.size_op()

    def current_rank(self) -> tf.Tensor:
        """Returns the rank in an elastic job, likewise."""
        with tf.device("CPU:0"):
            return self._hvd.rank_op()

    def split(self, groups: Sequence[Sequence[int]]) -> HorovodCommunicator:
        """Returns the communicator of this process's group, a process set. A collective call.

        Raises:
            ValueError: this communicator is not that of all processes.
            RuntimeError: Horovod does not accept new process sets.
        """
        if self._process_set is not self._hvd.global_process_set:
            raise ValueError(
                "Only all processes of Horovod together can be split, since each of them has to "
                f"know all process sets. Received: groups of {self._process_set}. Give each layer "
                "the process set of its group instead: HorovodCommunicator(process_set)."
            )
        sets = [self._process_set_of(ranks) for ranks in groups]  # all of them, on all processes
        return HorovodCommunicator(next(one for one in sets if one.included()))

    def _process_set_of(self, ranks: Sequence[int]) -> Any:
        # Horovod accepts no second process set of the same processes, and has no public API to look
        # up the first. Tried with 0.28.1, its last release.
        from horovod.common import process_sets

        known = process_sets._basics._get_process_set_ids_and_ranks()
        for number, members in known.items():
            if sorted(members) == sorted(ranks):
                process_set = self._hvd.ProcessSet(ranks)
                process_set.process_set_id = number
                return process_set
        try:
            return self._hvd.add_process_set(ranks)
        except ValueError as error:
            raise RuntimeError(
                "Groups need Horovod to accept new process sets. Received: a job in which it does "
                f"not ({error}). Call hvd.init(process_sets='dynamic'), or set "
                "HOROVOD_DYNAMIC_PROCESS_SETS=1."
            ) from error

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._all_reduce_sum(self._orders[name].turn(), tensor, name)

    def for_call(self, scope: str) -> AddUp:
        turn = self._orders[scope].turn()
        return lambda tensor, name: self._all_reduce_sum(turn, tensor, f"{scope}/{name}")

    def _all_reduce_sum(self, turn: Turn, tensor: tf.Tensor, name: str) -> tf.Tensor:
        refuse_transformations("Horovod", tensor)
        # All ranks make the call. In an elastic job `watch_elastic_job` starts the watchdog.
        if self._members is None and not self.resizable:
            watch_job(_watched_job(self._hvd))
        tensor, dtype = tf.cast(tensor, wire_dtype(tensor.dtype)), tensor.dtype
        if in_session():  # where nothing has a program order
            total = self._add_up(tensor, name)
        else:
            total = turn.all_reduce_sum(self._add_up, tensor, name)
        return tf.cast(total, dtype)

    def _add_up(self, tensor: tf.Tensor, name: str, witness: tf.Tensor | None = None) -> tf.Tensor:
        # A graph makes names unique by numbering them, in the order of the trace, which is the same
        # everywhere.
        return self._collective(self._hvd.allreduce, tensor, name)

    def grouped_all_reduce_sum(self, tensors: list[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Returns the sums of tensors of one dtype over all replicas, negotiated as one.

        Args:
            tensors: float32 or float64, with the same shapes on all replicas.
            name: As for `all_reduce_sum`.
        """
        refuse_xla("Horovod")
        return self._collective(self._hvd.grouped_allreduce, tensors, name)

    def _collective(self, all_reduce: Callable, tensors: Any, name: str) -> Any:
        """Returns the sums of a tensor, or of some, by one of Horovod's functions."""
        name = operation_name(name)

        def collective(tensors: Any) -> Any:
            return all_reduce(tensors, op=self._hvd.Sum, name=name, process_set=self._process_set)

        def named(tensors: Any) -> Any:
            return self._eager_calls(collective, tensors, name)

        note_collective(name)
        call = named if tf.executing_eagerly() else collective
        return RECORDER.watch(name, self._members, tensors, call)


def watch_elastic_job() -> None:
    """Starts the watchdog of an elastic job, as it is now, unless it runs.

    All workers call it, before their first synchronized call. Where a worker is lost meanwhile,
    that call fails too.
    """
    from horovod.common.exceptions import HorovodInternalError

    # What Horovod takes where nothing is set.
    notices_loss = float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS") or 30)
    job = _watched_job(import_horovod())._replace(share_in_thread=False, notices_loss=notices_loss)
    with contextlib.suppress(HorovodInternalError), lost_collectives_as_internal_errors():
        watch_job(job)


def _watched_job(hvd: Any) -> WatchedJob:
    def share(own: bytes | None) -> bytes:
        with tf.device("CPU:0"):
            message, name = tf.constant(to_array(own)), "syncbn/watchdog"
            # By a name, since this is a thread of its own, beside whatever the program broadcasts.
            total = EagerCalls()(lambda one: hvd.broadcast(one, 0, name=name), message, name)
            return to_bytes(total.numpy())

    one_host = hvd.local_size() == hvd.size()
    return WatchedJob("horovod", hvd.rank(), hvd.size(), one_host, share)


def import_horovod() -> Any:
    """Returns the module ``horovod.tensorflow``.

    Raises:
        ImportError: Horovod with TensorFlow support is not installed.
    """
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ImportError(
            "communicator='horovod' needs Horovod with TensorFlow support. It has no wheels "
            "and its last release does not build unpatched: run `syncbn install-horovod`."
        ) from error
    return hvd
