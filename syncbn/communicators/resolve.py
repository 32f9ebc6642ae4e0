"""The one place that chooses an engine."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable

import tensorflow as tf

from syncbn.communicators.base import Communicator
from syncbn.communicators.distribute import DistributeCommunicator
from syncbn.communicators.horovod import HorovodCommunicator
from syncbn.communicators.launcher import launched
from syncbn.communicators.local import LocalCommunicator
from syncbn.communicators.mpi import MPICommunicator

_ENGINES: dict[str, Callable[[], Communicator]] = {
    "tf.distribute": DistributeCommunicator,
    "horovod": HorovodCommunicator,
    "mpi": MPICommunicator,
    "local": LocalCommunicator,
}
NAMES = ("auto", *_ENGINES)
_MEMBERS = ("name", "supports_jit", "size", "rank", "all_reduce_sum")

_log = logging.getLogger("syncbn")


def check(communicator: str | Communicator) -> str | Communicator:
    """Returns ``communicator`` when `resolve` could take it.

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

    ``"auto"`` chooses, in this order: tf.distribute, in a strategy with more than one replica;
    Horovod, imported and initialized with more than one process; MPI, likewise through mpi4py;
    otherwise one replica. The choice is logged once, to the logger ``syncbn``.

    Args:
        communicator: ``"auto"``, ``"tf.distribute"``, ``"horovod"``, ``"mpi"``, ``"local"``, or a
            `Communicator`, which is returned as it is.

    Raises:
        ValueError, TypeError: no such communicator.
        ImportError: the engine that was asked for is not installed.
        RuntimeError: it is not initialized, or not with all processes of the job; or, with
            ``"auto"``, a launcher started several processes and none of the engines joins them.
    """
    check(communicator)
    if not isinstance(communicator, str):
        return communicator
    if communicator != "auto":
        return _engine(communicator)
    name = choose()
    launch = launched()
    if name == "local" and launch.processes > 1:
        raise RuntimeError(
            "A synchronized layer needs an engine that joins the processes of the job. Received: "
            f"{launch.variable} says that {launch.processes} processes were started, and no engine "
            "is initialized with more than one. Call horovod.tensorflow's init() under horovodrun, "
            "import mpi4py.MPI under mpirun, build the model in the scope of "
            "tf.distribute.MultiWorkerMirroredStrategy under TF_CONFIG, or say "
            "communicator='local' for statistics of each process alone."
        )
    return _engine(name)


def choose() -> str:
    """Returns the name of the engine that ``"auto"`` stands for here and now."""
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return "tf.distribute"
    # Looked up, never imported: a job that uses Horovod or MPI has imported it by now.
    hvd = sys.modules.get("horovod.tensorflow")
    if hvd is not None and hvd.is_initialized() and hvd.size() > 1:
        return "horovod"
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return "local"
    return "mpi" if mpi.COMM_WORLD.size > 1 else "local"


def supports_jit(communicator: str | Communicator) -> bool:
    """Says whether XLA can compile a training step with ``communicator``, as far as known now."""
    if not isinstance(communicator, str):
        return communicator.supports_jit
    return (choose() if communicator == "auto" else communicator) == "local"


@functools.cache
def _engine(name: str) -> Communicator:
    engine = _ENGINES[name]()
    _log.info("syncbn synchronizes with %r", name)
    return engine
