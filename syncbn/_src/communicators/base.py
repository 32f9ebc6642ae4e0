"""What a communicator is: all that a layer needs of the engine that joins the replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import tensorflow as tf


@runtime_checkable
class Communicator(Protocol):
    """Adds tensors up over replicas.

    Any object with these members can be given to a layer. Replicas must issue their calls in the
    same order; each call takes part in one collective.

    A layer with groups also needs ``split(groups) -> Communicator``: called on all replicas with
    the ranks of each group, it returns one for the group of this replica.

    One that runs its calls in an order of its own may have ``for_call(scope)``. It returns
    ``all_reduce_sum`` for the calls of one layer that belong together: those of its forward pass,
    and those of the gradient, which may be made in another graph. Names then begin with ``scope``.
    """

    name: str
    """One of the names that ``communicator=`` takes: all that a saved or cloned layer keeps."""

    supports_jit: bool
    """Whether XLA can compile a function that holds an `all_reduce_sum`."""

    @property
    def size(self) -> int:
        """How many replicas take part."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns the sum of ``tensor`` over all replicas, in shape and dtype of ``tensor``.

        Differentiable: the gradient of a sum over replicas is the sum of the replicas' gradients.

        Args:
            tensor: Floating, of one shape and dtype on all replicas.
            name: The same on all replicas for the same call, and another one for another call that
                may be under way at the same time.
        """


def process_communicator(communicator: Communicator) -> Communicator:
    """Returns what joins the processes, where a call is made outside of replicas.

    That is the communicator itself, unless it joins replicas within processes too.
    """
    return getattr(communicator, "across", communicator)


def wire_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype in which what is of ``dtype`` is added up over processes."""
    # A sum over many overflows in 16 bits where their mean does not, and MPI knows none of these.
    return tf.float32 if dtype.size < 4 else dtype


def sums_for_call(communicator: Communicator, scope: str) -> Callable[[tf.Tensor, str], tf.Tensor]:
    """Returns `Communicator.all_reduce_sum` for one call of a layer and for its gradient.

    Args:
        communicator: What joins the replicas.
        scope: The first part of the names.
    """
    if hasattr(communicator, "for_call"):
        return communicator.for_call(scope)
    return lambda tensor, name: communicator.all_reduce_sum(tensor, f"{scope}/{name}")
