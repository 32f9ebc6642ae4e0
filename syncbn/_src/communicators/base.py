"""The communicator protocol: all that a layer needs of the engine that joins the replicas."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import tensorflow as tf

_T = TypeVar("_T")


@runtime_checkable
class Communicator(Protocol):
    """Sums tensors over replicas.

    Any object with these members can be given to a layer. Replicas must issue their calls in the
    same order; each call is one collective.

    A layer with groups also needs ``split(groups) -> Communicator``: called on all replicas with
    the ranks of each group, it returns one for the group of this replica.

    One that keeps its calls in order itself may have ``for_call(scope)``. It returns an
    ``all_reduce_sum`` for the calls of one layer that belong together: those of its forward pass,
    and those of the gradient, which may be in another graph. Their names begin with ``scope``.

    Layers give it vectors with a few more numbers at the end, by which replicas find out that they
    make different calls. One that finds that out itself may say so: ``finds_mixups = True``.

    Example:
        >>> class Alone:
        ...     name, supports_jit, size, rank = "local", True, 1, 0
        ...
        ...     def all_reduce_sum(self, tensor, name):
        ...         return tensor
        >>> isinstance(Alone(), syncbn.Communicator)
        True
        >>> layer = syncbn.SyncBatchNormalization(communicator=Alone())
    """

    name: str
    """One of the names that ``communicator=`` takes, and all that a saved or cloned layer keeps."""

    supports_jit: bool
    """Whether XLA can compile a function that contains an `all_reduce_sum`."""

    @property
    def size(self) -> int:
        """The number of replicas."""

    @property
    def rank(self) -> int:
        """The number of this replica, from 0."""

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns the sum of ``tensor`` over all replicas, in shape and dtype of ``tensor``.

        Differentiable: the gradient of a sum over replicas is the sum of the replicas' gradients.

        Args:
            tensor: Floating, of one shape and dtype on all replicas.
            name: The same on all replicas for the same call, and different for calls that may be in
                flight at the same time.
        """


AddUp = Callable[[tf.Tensor, str], tf.Tensor]
"""Adds a tensor up over replicas, under a name."""


def current_size(communicator: Communicator) -> Any:
    """Returns the number of replicas as a trace may keep it.

    That is an integer; where replicas come and go a tensor, int32, read whenever the graph runs.
    """
    if is_resizable(communicator):
        return communicator.current_size()  # type: ignore[attr-defined]
    return communicator.size


def current_rank(communicator: Communicator) -> Any:
    """Returns the number of this replica, likewise."""
    if is_resizable(communicator):
        return communicator.current_rank()  # type: ignore[attr-defined]
    return communicator.rank


def is_resizable(communicator: Communicator) -> bool:
    """Says whether replicas come and go, as in an elastic job.

    Then nothing may be traced that is right for one size only, and nothing communicated while a
    function is traced: those that have been there before do not trace it again.
    """
    return getattr(communicator, "resizable", False)


def process_communicator(communicator: Communicator) -> Communicator:
    """Returns the communicator of the processes, for calls outside of a replica context.

    That is ``communicator`` itself, unless it also joins the replicas within each process.
    """
    return getattr(communicator, "across", communicator)


_without_weak_references: list[Communicator] = []


def kept_for(communicator: Communicator, made: dict[int, _T], make: Callable[[], _T]) -> _T:
    """Returns what is made for a communicator once, and kept as long as that lives.

    Args:
        communicator: It need not be hashable, and equal ones may be different.
        made: Where things of this kind are kept, by the identities of communicators.
        make: Makes the thing.
    """
    key = id(communicator)
    if key not in made:
        made[key] = make()
        try:
            weakref.finalize(communicator, made.pop, key).atexit = False
        except TypeError:
            # Such as one with slots: kept alive, so that its identity is not another's later.
            _without_weak_references.append(communicator)
    return made[key]


def wire_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype in which tensors of ``dtype`` are summed over processes."""
    # A sum over many overflows in 16 bits where their mean does not, and MPI has no such floats.
    return tf.float32 if dtype.size < 4 else dtype


def joins_by_messages(communicator: Communicator) -> bool:
    """Says whether there are other workers, which only messages of this package join."""
    return communicator.name != "tf.distribute" and communicator.size > 1
