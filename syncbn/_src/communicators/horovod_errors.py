"""Errors of Horovod's collectives: which they are, and as what Horovod's elastic mode takes them.

A collective fails where another process is lost. TensorFlow reports that like any error of an
operation, and Horovod's own ``elastic.run`` looks for the names of three of its operations in the
text: others' errors it drops, and returns as if all were done. Tried with Horovod 0.28.1 and
TensorFlow 2.21; tests/launchers/test_elastic.py loses workers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from syncbn._src.communicators.launcher import is_elastic

_KINDS = (tf.errors.UnknownError, tf.errors.AbortedError, tf.errors.FailedPreconditionError)
"""What Horovod's operations raise when a message is lost, or after that.

Sizes that do not match are an InvalidArgumentError or a FailedPreconditionError, and a fault of the
program."""

_ENDED = re.compile(r"Horovod has (been shut down|not been initialized)")
"""Words of Horovod's, whichever operation it was."""

_OPERATION = re.compile(
    # An operation that ran eagerly, or that has the name which Horovod gives to its own.
    r"Horovod(Grouped)?(Allreduce|Allgather|Broadcast|Alltoall|Reducescatter|Join|Barrier)"
    # A node of a graph, with the place in the code where it was made, of which not all have one.
    r"|horovod/tensorflow/mpi_ops\.py"
)

_NODE = re.compile(r"\{\{node ([^}]+?)(_\d+)?\}\}")
_names: set[str] = set()


def note_collective(name: str) -> None:
    """Takes a note of the name that a collective has in a graph, by which its error is known."""
    _names.add(name)


def is_lost_collective(error: tf.errors.OpError) -> bool:
    """Says whether an error is that of a collective of Horovod that did not come about."""
    if not isinstance(error, _KINDS):
        return False
    if _ENDED.search(error.message):
        return True
    if not isinstance(error, tf.errors.UnknownError):
        return False
    nodes = [name for name, _ in _NODE.findall(error.message)]
    ours = any(node == name or node.endswith(f"/{name}") for node in nodes for name in _names)
    return ours or bool(_OPERATION.search(error.message))


@contextlib.contextmanager
def lost_collectives_as_internal_errors() -> Iterator[None]:
    """Raises the error of a lost collective as ``HorovodInternalError``, and all others unchanged.

    It does so in an elastic job, and nothing in any other.

    Raises:
        HorovodInternalError: a collective has failed in the context.
    """
    if not is_elastic():
        yield
        return
    from horovod.common.exceptions import HorovodInternalError

    try:
        yield
    except tf.errors.OpError as error:
        if is_lost_collective(error):
            raise HorovodInternalError(error.message) from error
        raise
