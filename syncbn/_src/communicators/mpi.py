"""MPI through mpi4py: the processes of an `mpirun` job, or those of a communicator."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import AddUp, wire_dtype
from syncbn._src.communicators.launcher import require_whole_job, running_mpi
from syncbn._src.communicators.order import Order, Turn
from syncbn._src.communicators.tracing import refuse_transformations
from syncbn._src.ops.graphs import in_session
from syncbn._src.watchdog.flight_recorder import RECORDER
from syncbn._src.watchdog.waiting_for_all import within_limits
from syncbn._src.watchdog.watchdog import WatchedJob, to_array, to_bytes, watch_job


class MPICommunicator:
    """All MPI processes, or those of one `mpi4py.MPI.Comm`.

    The communicator is duplicated, so that these messages never mix with others; creating one is
    therefore a collective call of all of its processes. Those created from the same
    `mpi4py.MPI.Comm` share one duplicate, which is never freed, and one order of calls.

    Args:
        comm: An intracommunicator, or ``None`` for ``MPI.COMM_WORLD``.

    Raises:
        ImportError: mpi4py, or an MPI library for it, is not installed.
        RuntimeError: MPI is not initialized, does not support threads, or runs with one process
            while the launcher started several.

    Example:
        In a job of two processes on one machine:

        >>> from mpi4py import MPI
        >>> machine = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        >>> syncbn.MPICommunicator(machine).size
        2
    """

    name = "mpi"
    supports_jit = False
    finds_mixups = True

    def __init__(self, comm: Any = None):
        self._mpi = import_mpi()
        if running_mpi() is None:
            raise RuntimeError(
                "communicator='mpi' needs MPI to be initialized. Received: a process in which it "
                "is not. Call mpi4py.MPI.Init() before the first training step."
            )
        self._require_threads(
            self._mpi.THREAD_SERIALIZED,
            "TensorFlow calls MPI from threads of its own, so MPI must be initialized with "
            "THREAD_SERIALIZED at least.",
        )
        require_whole_job(
            "MPI",
            self._mpi.COMM_WORLD.size,
            "Start the job with the mpirun of the MPI library that mpi4py was built for, "
            "or use communicator='horovod' under horovodrun over Gloo.",
        )
        self._shared = _shared(self._mpi, self._mpi.COMM_WORLD if comm is None else comm)
        self._comm, self._order = self._shared.comm, self._shared.order
        self._members = self._shared.members

    @property
    def size(self) -> int:
        return self._comm.size

    @property
    def rank(self) -> int:
        return self._comm.rank

    def lane(self, number: int) -> MPICommunicator:
        """Returns another communicator of the same processes, with messages that never mix.

        A collective call. This one and lanes of different numbers may be used from different
        threads at the same time. Lanes are for small tensors: each process sends whole ones.

        Raises:
            RuntimeError: MPI is not initialized with THREAD_MULTIPLE.
        """
        self._require_threads(
            self._mpi.THREAD_MULTIPLE,
            "MPI must be initialized with THREAD_MULTIPLE to be called from several threads at a "
            "time.",
        )
        if self._shared.lanes is None:
            self._shared.lanes = self._comm.Dup()
        return _Lane(self, self._shared.lanes, number)

    def _require_threads(self, least: int, requirement: str) -> None:
        level = self._mpi.Query_thread()
        if level < least:
            raise RuntimeError(
                f"{requirement} Received: level {level}. Set mpi4py.rc.thread_level = 'multiple' "
                "before importing mpi4py.MPI."
            )

    def split(self, groups: Sequence[Sequence[int]]) -> MPICommunicator:
        """Returns the communicator of this process's group. A collective call.

        Its calls and those of this communicator keep one order.
        """
        key = tuple(map(tuple, groups))
        if key not in self._shared.parts:
            color = next(number for number, ranks in enumerate(groups) if self.rank in ranks)
            part = self._comm.Split(color, self.rank)
            group = self._shared.parts[key] = MPICommunicator(part)
            part.Free()  # `group` has a duplicate
            group._order = self._order
        return self._shared.parts[key]

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._all_reduce_sum(self._order.turn(), tensor, name)

    def for_call(self, scope: str) -> AddUp:
        turn = self._order.turn()
        return lambda tensor, name: self._all_reduce_sum(turn, tensor, f"{scope}/{name}")

    def _all_reduce_sum(self, turn: Turn, tensor: tf.Tensor, name: str) -> tf.Tensor:
        refuse_transformations("MPI", tensor)
        if in_session():
            raise NotImplementedError(
                "MPI matches calls by their order, and the graph of a session has none. Received: "
                "a training call with communicator='mpi' in such a graph. Use Horovod, which "
                "matches them by name (communicator='horovod'), or eager execution."
            )
        wire = tf.cast(tensor, wire_dtype(tensor.dtype))
        total = turn.all_reduce_sum(self._add_up, wire, name)
        return tf.cast(total, tensor.dtype)

    def _add_up(self, tensor: tf.Tensor, name: str, witness: tf.Tensor | None) -> tf.Tensor:
        if tf.executing_eagerly():
            return tf.constant(self._all_reduce(name, tensor.numpy()))
        # The unique name that the graph will give it.
        unique = tf.compat.v1.get_default_graph().unique_name(name, mark_as_used=False)
        inputs = [tensor] if witness is None else [tensor, witness]
        total = tf.numpy_function(
            functools.partial(self._all_reduce, unique), inputs, tensor.dtype, name=name
        )
        total.set_shape(tensor.shape)
        return total

    def _all_reduce(self, name: str, value: np.ndarray, *witness: np.ndarray) -> np.ndarray:
        value = np.asarray(value, order="C")
        with RECORDER.enter(name, self._members):
            self._require_same_call(f"{name}, {value.dtype.name} {value.shape}", *witness)
            total = np.empty_like(value)
            self._comm.Allreduce(value, total, op=self._mpi.SUM)
        return total

    def _require_same_call(self, call: str, *witness: np.ndarray) -> None:
        """Raises on all ranks where they make different calls.

        Backward functions of nested functions have no order when a tape outside of a `tf.function`
        creates them, and messages of different sizes would corrupt memory.
        """
        digest = zlib.crc32(call.encode())
        for array in witness:
            digest = zlib.crc32(array.tobytes(), digest)
        most = np.empty(2, np.int64)
        self._comm.Allreduce(np.array([digest, -digest], np.int64), most, op=self._mpi.MAX)
        if most[0] == -most[1]:
            return
        own, all_calls = np.zeros(256, np.uint8), np.zeros((self.size, 256), np.uint8)
        text = np.frombuffer(call.encode()[-256:], np.uint8)
        own[: len(text)] = text
        self._comm.Allgather(own, all_calls)
        calls = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in all_calls]
        raise RuntimeError(
            "MPI matches calls by their order, so all workers must make the same ones in the same "
            "order. Received: "
            + "; ".join(f"on rank {rank} {one}" for rank, one in enumerate(calls))
            + ". Make the same calls on every worker. Where only the numbers in names differ, name "
            "models and layers. Where a tf.function calls others, put the GradientTape inside of "
            "the outer one, once, or use Horovod, which matches by name."
        )


class _Lane(MPICommunicator):
    """One whose messages have a tag, so that several share an MPI communicator.

    An MPI communicator for each lane could not be freed, since TensorFlow keeps the Python
    functions of its graphs for ever, and Open MPI has only 65,532. An MPI all-reduce has no tag.
    """

    def __init__(self, one: MPICommunicator, comm: Any, number: int):
        self._mpi, self._shared, self._comm, self._order = one._mpi, one._shared, comm, Order()
        self._tag = number % (self._mpi.COMM_WORLD.Get_attr(self._mpi.TAG_UB) + 1)

    def _all_reduce(self, name: str, value: np.ndarray, *witness: np.ndarray) -> np.ndarray:
        # Over a binomial tree: to rank 0, and back.
        comm, tag = self._comm, self._tag
        total, received = np.array(value, order="C"), np.empty_like(value, order="C")
        step, children = 1, []
        while step < comm.size and not comm.rank & step:
            if comm.rank + step < comm.size:
                children.append(comm.rank + step)
                comm.Recv(received, children[-1], tag)
                total += received
            step *= 2
        if comm.rank:
            comm.Send(total, comm.rank - step, tag)
            comm.Recv(total, comm.rank - step, tag)
        for child in reversed(children):
            comm.Send(total, child, tag)
        return total


class _Shared:
    """What the communicators created from one `mpi4py.MPI.Comm` share.

    None of its MPI communicators is ever freed: freeing is collective, and no process knows when
    the others are done. There are few, as each exists once.
    """

    def __init__(self, mpi: Any, comm: Any):
        with within_limits("make their first synchronized call", mpi.COMM_WORLD.Abort):
            self.comm = comm.Dup()
        # MPI matches calls by their order, so all processes need the same one.
        self.order = Order()
        self.lanes: Any = None
        self.parts: dict[tuple[tuple[int, ...], ...], MPICommunicator] = {}
        self.members = _members(mpi, self.comm)
        if self.members is None:
            _watch(mpi, self.comm)


def _members(mpi: Any, comm: Any) -> tuple[int, ...] | None:
    """Returns the ranks of the job that a communicator has; ``None`` where it has all."""
    if comm.size == mpi.COMM_WORLD.size:
        return None
    ours, world = comm.Get_group(), mpi.COMM_WORLD.Get_group()
    return tuple(ours.Translate_ranks(range(comm.size), world))


def _watch(mpi: Any, comm: Any) -> None:
    """Starts the watchdog, whose store all processes of the job have to know."""
    machine = comm.Split_type(mpi.COMM_TYPE_SHARED)
    one_host = machine.size == comm.size
    machine.Free()
    world, ours = mpi.COMM_WORLD.Get_group(), comm.Get_group()
    (root,) = world.Translate_ranks([0], ours)

    def share(own: bytes | None) -> bytes:
        message = to_array(own)
        comm.Bcast(message, root)
        return to_bytes(message)

    rank, size, abort = mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size, mpi.COMM_WORLD.Abort
    watch_job(WatchedJob("mpi", rank, size, one_host, share, share_in_thread=False, end=abort))


def _shared(mpi: Any, comm: Any) -> _Shared:
    # MPI's attribute caching: a library's own data of a communicator, not copied to duplicates.
    key = _attribute(mpi)
    if comm.Get_attr(key) is None:
        comm.Set_attr(key, _Shared(mpi, comm))
    return comm.Get_attr(key)


@functools.cache
def _attribute(mpi: Any) -> int:
    return mpi.Comm.Create_keyval()


def import_mpi() -> Any:
    """Returns the module ``mpi4py.MPI``.

    Raises:
        ImportError: mpi4py, or an MPI library for it, is not installed.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py raises the latter without libmpi
        raise ImportError(
            "communicator='mpi' needs mpi4py and an MPI library: pip install 'syncbn[mpi]'"
        ) from error
    return MPI
