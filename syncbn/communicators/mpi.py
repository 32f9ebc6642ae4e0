"""MPI through mpi4py: the processes of an `mpirun` job, or those of a communicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn.communicators.launcher import require_whole_job
from syncbn.communicators.tracing import refuse_xla


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
        self._turn: tf.Variable | None = None

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
        group._turn = self._turn_variable()
        return group

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        refuse_xla("MPI")

        @tf.custom_gradient
        def reduce(tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return self.all_reduce_sum(upstream, f"{name}/gradient")

            return self._reduce(tensor, name), gradient

        return reduce(tensor)

    def _reduce(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        # MPI knows no 16-bit floats.
        wire = tensor.dtype if tensor.dtype in (tf.float32, tf.float64) else tf.float32
        value = tf.cast(tensor, wire)
        if tf.executing_eagerly():
            return tf.cast(tf.constant(self._all_reduce(value.numpy())), tensor.dtype)
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise NotImplementedError(
                "MPI matches calls by their order, and the graph of a session has none. Received: "
                "a training call with communicator='mpi' in such a graph. Use Horovod, which "
                "matches them by name (communicator='horovod'), or eager execution."
            )
        # MPI matches calls by their order, so all processes need the same one, while TensorFlow
        # runs operations without a path between them in any. Touching one variable before and
        # after each call orders them all, across nested functions, loops and branches too, since
        # TensorFlow keeps accesses to a variable in program order wherever they are.
        turn = self._turn_variable()
        with tf.control_dependencies([value, turn.assign_add(1)]):
            total = tf.numpy_function(self._all_reduce, [value], wire, name=name)
        total.set_shape(tensor.shape)
        with tf.control_dependencies([total]):
            turn.assign_add(1)
        return tf.cast(total, tensor.dtype)

    def _all_reduce(self, value: np.ndarray) -> np.ndarray:
        total = np.empty_like(value)
        self._comm.Allreduce(np.ascontiguousarray(value), total, op=self._mpi.SUM)
        return total

    def _turn_variable(self) -> tf.Variable:
        if self._turn is None:
            with tf.init_scope(), tf.device("CPU:0"):
                self._turn = tf.Variable(0, trainable=False, dtype=tf.int64, name="mpi_turn")
        return self._turn
