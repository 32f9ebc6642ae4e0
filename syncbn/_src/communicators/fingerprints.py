"""Sums that say of which call they are, so that a mix-up is an error on all replicas.

What is added up by its place in a sequence of calls is whatever the others add up there. So each
tensor takes along a one and the bytes of a checksum of its call. Where all replicas make one call,
the sums of the bytes are as many times a replica's own as the sum of the ones says; a replica that
makes another call knows likewise. Bytes, since their sums are exact in float32 too.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import AddUp, Communicator
from syncbn._src.communicators.strategy import replica_number
from syncbn._src.ops import xla
from syncbn._src.ops.graphs import in_session, traced_outside

_CALL = slice(0, 4)
LENGTH = 9
"""How many numbers a tensor takes along: a one, and the bytes of two checksums."""

_calls: dict[bytes, str] = {}
"""The calls that this process has made or traced, by their checksums."""

_numbers: WeakKeyDictionary[tf.Graph, Counter] = WeakKeyDictionary()


def numbered(scope: str) -> str:
    """Returns a scope of its own for each call of a layer in a graph.

    A call's gradient takes the scope of the call, and so not the place of another one's.
    """
    if tf.executing_eagerly():
        return scope
    # The replicas of a strategy are traced into one graph.
    replica = None if tf.distribute.in_cross_replica_context() else replica_number()
    calls = _numbers.setdefault(tf.compat.v1.get_default_graph(), Counter())
    calls[scope, replica] += 1
    number = calls[scope, replica]
    return scope if number == 1 else f"{scope}/call_{number}"


def sums(communicator: Communicator) -> AddUp:
    """Returns `Communicator.all_reduce_sum`, of one dtype of 32 bits at least, without mix-ups.

    Engines of this package see to that themselves, and say so by an attribute ``finds_mixups``. The
    tensors of others have a fingerprint.
    """
    add_up = communicator.all_reduce_sum
    if communicator.size == 1 or getattr(communicator, "finds_mixups", False):
        return add_up
    return lambda tensor, name: fingerprinted(lambda one: add_up(one, name), tensor, name)


def sums_for_call(communicator: Communicator, scope: str) -> AddUp:
    """Returns `sums` for one call of a layer and for its gradient.

    Args:
        communicator: What joins the replicas.
        scope: The first part of the names.
    """
    if hasattr(communicator, "for_call"):
        add_up = communicator.for_call(scope)
    else:
        plain = sums(communicator)

        def add_up(tensor: tf.Tensor, name: str) -> tf.Tensor:
            return plain(tensor, f"{scope}/{name}")

    # Horovod keeps a list of the names that there have been.
    return add_up if communicator.name == "horovod" else _Witnessed(add_up)


class _Witnessed:
    """Sums of one call, of which the later ones are named after what the first one has come to.

    That is the same on all replicas, and another for another call. A graph has numbers for its
    calls; eagerly, nothing else tells the gradients of one layer's calls apart.
    """

    def __init__(self, add_up: AddUp):
        self._add_up, self._witness = add_up, ""

    def __call__(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        total = self._add_up(tensor, name + self._witness)
        if tf.executing_eagerly() and not self._witness:
            self._witness = f">{zlib.crc32(total.numpy().tobytes()):08x}"
        return total


def fingerprinted(
    add_up: Callable[[tf.Tensor], tf.Tensor], tensor: tf.Tensor, name: str
) -> tf.Tensor:
    """Returns ``add_up(tensor)``, or raises where other replicas make another call.

    Differentiable as ``add_up`` is. Where XLA compiles all, which knows no errors, it returns NaNs.

    Args:
        add_up: Adds vectors up over the replicas.
        tensor: Of 32 bits at least.
        name: The same on all replicas for the same call. What stands behind a ``>`` tells apart
            calls of the same name.
    """
    name, _, witness = name.partition(">")
    call = f"{name}, {tensor.dtype.name}"
    if tensor.shape.is_fully_defined():  # as it need not be on every replica
        call += f" {tuple(tensor.shape)}"
    checksum = _checksum(call)
    _calls[checksum] = call
    mark = tf.constant([*checksum, *_checksum(witness)], tensor.dtype)
    vector = tensor if tensor.shape.rank == 1 else tf.reshape(tensor, [-1])
    total = add_up(tf.concat([vector, tf.ones([1], tensor.dtype), mark], 0))
    values, replicas, marks = tf.split(total, [_size(vector), 1, LENGTH - 1])
    same = _require_same_call(replicas, marks, mark)
    with tf.control_dependencies([same]):
        values = tf.identity(values) if vector is tensor else tf.reshape(values, tf.shape(tensor))
    values.set_shape(tensor.shape)
    if xla.compiles_everything():
        return tf.where(same, values, tf.constant(float("nan"), values.dtype))
    return values


def _size(vector: tf.Tensor) -> int:
    size = vector.shape.num_elements()
    return -1 if size is None else size  # which `tf.split` takes for the rest


def _checksum(text: str) -> bytes:
    return zlib.crc32(text.encode()).to_bytes(4, "big")


def _require_same_call(replicas: tf.Tensor, marks: tf.Tensor, own: tf.Tensor) -> tf.Tensor:
    same = tf.reduce_all(marks == replicas * own)
    if tf.executing_eagerly():
        return same if same else _refuse(replicas.numpy(), marks.numpy(), own.numpy())
    if xla.compiles_everything():
        return same
    inputs = [replicas, marks, own]
    if in_session():
        return tf.cond(same, lambda: _go_on(*inputs), lambda: _call_python(*inputs))
    # Python is called where there is something to say, and only there. Not by `tf.cond`: it would
    # make the branches anew for each call, and TensorFlow put them in its place (106 of them: 4.3 s
    # for the first run, and 1.8 s so).
    specs = [tf.TensorSpec(one.shape, one.dtype) for one in inputs]
    with tf.device("CPU:0"):
        return tf.raw_ops.If(
            cond=same,
            input=inputs,
            Tout=[tf.bool],
            then_branch=_traced(_go_on, *specs),
            else_branch=_traced(_call_python, *specs),
        )[0]


_traced = functools.cache(traced_outside)


def _go_on(*inputs: tf.Tensor) -> tf.Tensor:
    return tf.constant(True)


def _call_python(*inputs: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(tf.numpy_function(_refuse, inputs, tf.bool), [])


def _refuse(replicas: np.ndarray, marks: np.ndarray, own: np.ndarray) -> bool:
    here, there = _calls[_bytes(own[_CALL])], _others(replicas[0], marks, own)
    raise RuntimeError(
        "All replicas must make the same calls in the same order. Received: "
        f"{here} here, and {there}. Make every training call "
        "on every replica, in one order, on inputs that differ in the batch only; build the same "
        "models everywhere, or name the layers, since Keras numbers them as they are made."
    )


def _others(replicas: float, marks: np.ndarray, own: np.ndarray) -> str:
    """Says what the other replicas call, if that is one call, and known here."""
    if not (np.isfinite([replicas, *marks]).all() and 1 < replicas == round(replicas)):
        return "something that is no call of a synchronized layer on others"
    # So many that make another call have made the difference.
    difference = (marks - replicas * own)[_CALL]
    if not difference.any():
        return "the same for another call of that layer elsewhere"
    for others in range(1, int(replicas)):
        theirs = own[_CALL] + difference / others
        if (theirs == np.clip(np.round(theirs), 0, 255)).all() and _bytes(theirs) in _calls:
            return f"{_calls[_bytes(theirs)]} on {others} of {int(replicas)} replicas"
    return f"calls that this process has not made on others of {int(replicas)} replicas"


def _bytes(numbers: np.ndarray) -> bytes:
    return numbers.astype(np.uint8).tobytes()
