"""The one place that chooses an engine."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from syncbn._src.communicators.base import Communicator, is_resizable
from syncbn._src.communicators.horovod import HorovodCommunicator
from syncbn._src.communicators.launcher import is_elastic, launched, running_mpi
from syncbn._src.communicators.local import LocalCommunicator
from syncbn._src.communicators.mpi import MPICommunicator
from syncbn._src.communicators.nested import NestedCommunicator
from syncbn._src.communicators.strategy import joined_processes, local_replicas
from syncbn._src.communicators.tf_distribute import DistributeCommunicator

_ENGINES: dict[str, Callable[[], Communicator]] = {
    "tf.distribute": DistributeCommunicator,
    "horovod": HorovodCommunicator,
    "mpi": MPICommunicator,
    "local": LocalCommunicator,
}
NAMES = ("auto", *_ENGINES)
_MEMBERS = ("name", "supports_jit", "size", "rank", "all_reduce_sum")

_log = logging.getLogger("syncbn")


def check_communicator(communicator: str | Communicator) -> str | Communicator:
    """Returns ``communicator`` if `resolve` accepts it.

    Raises:
        ValueError: an unknown name, of an engine or of a communicator.
        TypeError: neither a name nor a communicator.
    """
    if isinstance(communicator, str):
        if communicator not in NAMES:
            raise ValueError(
                f"`communicator` must be one of {', '.join(map(repr, NAMES))}, or a Communicator. "
                f"Received: communicator={communicator!r}."
            )
        return communicator
    # Without evaluating the members, some of which have a value in a replica only.
    missing = [
        member
        for member in _MEMBERS
        if inspect.getattr_static(communicator, member, _MEMBERS) is _MEMBERS
    ]
    if isinstance(communicator, type) or missing:
        raise TypeError(
            "`communicator` must be a name or an object with the members of "
            f"syncbn.Communicator. Received: communicator={communicator!r}."
        )
    if communicator.name not in NAMES:
        raise ValueError(
            "The name of a communicator is what a saved layer stores, so it must be one that "
            f"`communicator` takes: {', '.join(map(repr, NAMES))}. "
            f"Received: name={communicator.name!r}."
        )
    return communicator


def resolve(communicator: str | Communicator = "auto") -> Communicator:
    """Returns the communicator to use here and now.

    ``"auto"`` chooses, in this order: tf.distribute, in a strategy that joins several processes;
    Horovod, imported and initialized with more than one process, or in an elastic job with any
    number; MPI, with more than one process, through mpi4py;
    tf.distribute, in a strategy with more than one replica; otherwise the local communicator. The
    choice is logged once, to the logger ``syncbn``.

    In the scope of a strategy with several replicas in this process, such as a MirroredStrategy,
    Horovod and MPI join the replicas of all processes, whether they were chosen or asked for.

    Args:
        communicator: ``"auto"``, ``"tf.distribute"``, ``"horovod"``, ``"mpi"``, ``"local"``, or a
            `Communicator`, which is returned unchanged; but one of Horovod or MPI joins replicas
            too, see above.

    Raises:
        ValueError, TypeError: no such communicator.
        ImportError: the engine that was asked for is not installed.
        RuntimeError: it is not initialized, or not with all processes of the job; or, with
            ``"auto"`` and ``"tf.distribute"``, neither an engine nor the strategy joins all
            processes that a launcher has started.
        NotImplementedError: a strategy with several replicas in each process of an elastic job.

    Example:
        >>> syncbn.resolve().name  # in one process, without a strategy
        'local'
    """
    joined = _initialized()
    chosen = _chosen(joined) if check_communicator(communicator) == "auto" else communicator
    in_process = chosen == "tf.distribute" or isinstance(chosen, DistributeCommunicator)
    if in_process or (communicator == "auto" and chosen == "local"):
        _require_joined_processes(joined)
    return _of_replicas(_engine(chosen) if isinstance(chosen, str) else chosen)


def choose_engine() -> str:
    """Returns the name of the engine that ``"auto"`` stands for here and now."""
    return _chosen(_initialized())


def _chosen(joined: Joined) -> str:
    if joined.engine != "local" and joined_processes() == 1:
        return joined.engine
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1
    return "tf.distribute" if several else "local"


class Joined(NamedTuple):
    """The engine that joins processes, or ``"local"``, and the number of processes."""

    engine: str
    processes: int


def _initialized() -> Joined:
    # Looked up, never imported: a job that uses Horovod or MPI has imported it by now.
    hvd = sys.modules.get("horovod.tensorflow")
    if hvd is not None and hvd.is_initialized() and (hvd.size() > 1 or is_elastic()):
        return Joined("horovod", hvd.size())
    mpi = running_mpi()
    if mpi is None:
        return Joined("local", 1)
    size = mpi.COMM_WORLD.size
    return Joined("mpi" if size > 1 else "local", size)


def _of_replicas(communicator: Communicator) -> Communicator:
    """Returns one that also joins the replicas of each process, if it joins processes."""
    if isinstance(communicator, HorovodCommunicator | MPICommunicator) and local_replicas() > 1:
        if is_resizable(communicator):
            raise NotImplementedError(
                "In an elastic job each process has one replica. Received: "
                f"{type(tf.distribute.get_strategy()).__name__} with {local_replicas()} in this "
                "process. Start a process for each device."
            )
        return _nested(communicator)
    return communicator


@functools.cache
def _nested(across: HorovodCommunicator | MPICommunicator) -> NestedCommunicator:
    # The same one at each look-up, as layers keep the groups that they have made of it.
    return NestedCommunicator(across)


def _require_joined_processes(others: Joined) -> None:
    """Raises where there are processes in the job that the strategy here does not join."""
    joined, (engine, size), launch = joined_processes(), others, launched()
    strategy = type(tf.distribute.get_strategy()).__name__
    if size > joined:
        raise RuntimeError(
            "Statistics must be those of all processes of the job. Received: tf.distribute, whose "
            f"{strategy} joins {joined} of the {size} processes that {engine} joins. Use "
            "communicator='auto' in a MirroredStrategy, which joins the replicas of all processes: "
            "with group_size='node' for statistics of each machine, or as many replicas as a "
            "process has."
        )
    if joined > 1 or launch.processes == 1:
        return
    replicas = local_replicas()
    here = f", while {strategy} joins the {replicas} replicas of one process" * (replicas > 1)
    alone = (
        f"unset {launch.variable} where these are {launch.processes} jobs"
        if replicas > 1
        else "use communicator='local' for statistics of each process alone"
    )
    raise RuntimeError(
        "A synchronized layer needs an engine that joins the processes of the job. Received: "
        f"{launch.variable} says that {launch.processes} processes were started, and no engine "
        f"is initialized with more than one{here}. Call horovod.tensorflow's init() under "
        "horovodrun, import mpi4py.MPI under mpirun, build the model in the scope of "
        f"tf.distribute.MultiWorkerMirroredStrategy under TF_CONFIG, or {alone}."
    )


def supports_jit(communicator: str | Communicator) -> bool:
    """Says whether XLA can compile a training step with ``communicator``, as far as known now."""
    if not isinstance(communicator, str):
        return communicator.supports_jit
    return (choose_engine() if communicator == "auto" else communicator) == "local"


@functools.cache
def _engine(name: str) -> Communicator:
    engine = _ENGINES[name]()
    _log.info("syncbn synchronizes with %r", name)
    return engine
