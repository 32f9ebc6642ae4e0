"""MPI through mpi4py: the processes of an `mpirun` job, or those of a communicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn.communicators.launcher import require_whole_job
from syncbn.communicators.order import AddUp, Order, Turn
from syncbn.communicators.tracing import refuse_forward_mode, refuse_xla
from syncbn.communicators.vectorization import vectorized


class MPICommunicator:
    """All MPI processes, or those of one `mpi4py.MPI.Comm`.

    The communicator is duplicated, so that these messages never mix with others; making one is
    therefore a collective call, which all of its processes take part in.

    Args:
        comm: An intracommunicator, or ``None`` for ``MPI.COMM_WORLD``.

    Raises:
        ImportError: mpi4py, or an MPI library for it, is not installed.
        RuntimeError: MPI is not initialized, not for threads, or runs with one process while the
            launcher started several.
    """

    name = "mpi"
    supports_jit = False

    def __init__(self, comm: Any = None):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # mpi4py raises the latter without libmpi
            raise ImportError(
                "communicator='mpi' needs mpi4py and an MPI library: pip install 'syncbn[mpi]'"
            ) from error
        if not MPI.Is_initialized() or MPI.Is_finalized():
            raise RuntimeError(
                "communicator='mpi' needs MPI to be initialized. Received: a process in which it "
                "is not. Call mpi4py.MPI.Init() before the first training step."
            )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise RuntimeError(
                "TensorFlow calls MPI from threads of its own, so MPI must be initialized with "
                f"THREAD_SERIALIZED at least. Received: level {MPI.Query_thread()}. "
                "Set mpi4py.rc.thread_level = 'multiple' before importing mpi4py.MPI."
            )
        require_whole_job(
            "MPI",
            MPI.COMM_WORLD.size,
            "Start the job with the mpirun of the MPI library that mpi4py was built for, "
            "or use communicator='horovod' under horovodrun over Gloo.",
        )
        self._mpi = MPI
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        # MPI matches calls by their order, so all processes need the same one.
        self._order = Order()

    @property
    def size(self) -> int:
        return self._comm.size

    @property
    def rank(self) -> int:
        return self._comm.rank

    def duplicate(self) -> MPICommunicator:
        """Returns one for the same processes, whose messages never mix with those of this one.

        A collective call. The two may be used from different threads at the same time.

        Raises:
            RuntimeError: MPI is not initialized for that.
        """
        level = self._mpi.Query_thread()
        if level < self._mpi.THREAD_MULTIPLE:
            raise RuntimeError(
                "MPI must be initialized with THREAD_MULTIPLE to be called from several threads at "
                f"a time. Received: level {level}. Set mpi4py.rc.thread_level = 'multiple' before "
                "importing mpi4py.MPI."
            )
        return MPICommunicator(self._comm)

    def split(self, groups: Sequence[Sequence[int]]) -> MPICommunicator:
        """Returns one for the group of this process. A collective call.

        Its calls and those of this communicator keep one order.
        """
        color = next(number for number, ranks in enumerate(groups) if self.rank in ranks)
        part = self._comm.Split(color, self.rank)
        group = MPICommunicator(part)
        part.Free()  # `group` has a duplicate
        group._order = self._order
        return group

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._all_reduce_sum(self._order.turn(), tensor, name)

    def for_call(self, scope: str) -> AddUp:
        turn = self._order.turn()
        return lambda tensor, name: self._all_reduce_sum(turn, tensor, f"{scope}/{name}")

    def _all_reduce_sum(self, turn: Turn, tensor: tf.Tensor, name: str) -> tf.Tensor:
        refuse_xla("MPI")
        refuse_forward_mode("MPI", tensor)
        if not (tf.executing_eagerly() or tf.compat.v1.executing_eagerly_outside_functions()):
            raise NotImplementedError(
                "MPI matches calls by their order, and the graph of a session has none. Received: "
                "a training call with communicator='mpi' in such a graph. Use Horovod, which "
                "matches them by name (communicator='horovod'), or eager execution."
            )
        # MPI knows no 16-bit floats.
        wire = tensor.dtype if tensor.dtype in (tf.float32, tf.float64) else tf.float32
        total = turn.all_reduce_sum(self._add_up, tf.cast(tensor, wire), name)
        return tf.cast(total, tensor.dtype)

    def _add_up(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        if tf.executing_eagerly():
            return tf.constant(self._all_reduce(tensor.numpy()))
        total = tf.numpy_function(self._all_reduce, [tensor], tensor.dtype, name=name)
        total.set_shape(tensor.shape)
        return vectorized(total, lambda rows: self._add_up(rows, name))

    def _all_reduce(self, value: np.ndarray) -> np.ndarray:
        total = np.empty_like(value)
        self._comm.Allreduce(np.ascontiguousarray(value), total, op=self._mpi.SUM)
        return total
