"""Broadcasting the variables of one worker to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator, process_communicator
from syncbn._src.communicators.host_collectives import require_agreement, sum_arrays
from syncbn._src.communicators.resolution import resolve
from syncbn._src.keras_compat.layer_names import full_name

_LENGTH = "syncbn/broadcast/length"


def broadcast(variables: Any, root: int = 0, communicator: str | Communicator = "auto") -> None:
    """Broadcasts the values of variables on worker ``root`` to all workers, bit for bit.

    All workers make the call, outside of graphs, with variables of the same shapes and dtypes in
    the same order, which is checked first. Under tf.distribute, where variables are created equal,
    it does nothing; where each process of a job has a strategy, all per-replica copies get the
    values.

    Args:
        variables: A variable of TensorFlow or Keras, or a nested structure of them.
        root: The rank of the worker that has the values.
        communicator: As for `syncbn.SyncBatchNormalization`.

    Raises:
        ValueError: ``root`` is not a rank, or workers have variables of different shapes or dtypes.
        TypeError: a variable holds strings.
        RuntimeError: the call is made in a graph; and see `syncbn.resolve`.

    Example:
        >>> syncbn.training.broadcast(model.weights)  # all workers have those of rank 0
    """
    communicator = process_communicator(resolve(communicator))
    if communicator.name == "tf.distribute":
        return
    if not tf.executing_eagerly():
        raise RuntimeError(
            "broadcast assigns to variables at once, so it must be called eagerly. Received: a "
            "call inside a tf.function or a graph."
        )
    if not 0 <= root < communicator.size:
        raise ValueError(
            f"`root` must be a rank of the job, 0 to {communicator.size - 1}. "
            f"Received: root={root}."
        )
    if communicator.size == 1:
        return
    flat: Sequence[Any] = tf.nest.flatten(variables)
    values = [np.asarray(variable.numpy()) for variable in flat]
    require_agreement(
        communicator,
        [f"{value.dtype.name} {value.shape}" for value in values],
        [full_name(variable) for variable in flat],
        "variables",
        root,
    )
    for value in values:
        if value.dtype.kind in "OSU":
            raise TypeError(
                "`variables` must hold numbers. Received: one of strings. Leave it out."
            )
    # A broadcast is a sum to which the others add zeros. The bits are summed: a sum of values
    # would turn -0.0 into 0.0, and may change a NaN.
    wires = [_to_wire(value) for value in values]
    if communicator.rank != root:
        wires = [np.zeros_like(wire) for wire in wires]
    totals = sum_arrays(communicator, wires, "syncbn/broadcast")
    if communicator.rank != root:
        for variable, value, total in zip(flat, values, totals, strict=True):
            variable.assign(_from_wire(total, value))


def _to_wire(value: np.ndarray) -> np.ndarray:
    """Returns the 16-bit parts of an array, or its bytes, each exact in float32."""
    return np.frombuffer(value.tobytes(), _part(value.dtype)).astype(np.float32)


def _from_wire(wire: np.ndarray, like: np.ndarray) -> np.ndarray:
    parts = wire.astype(_part(like.dtype))
    return np.frombuffer(parts.tobytes(), like.dtype).reshape(like.shape)


def _part(dtype: np.dtype) -> type[np.unsignedinteger]:
    return np.uint16 if dtype.itemsize % 2 == 0 else np.uint8


def broadcast_text(text: str, communicator: Communicator) -> str:
    """Returns the text of rank 0. A collective call, with texts of any length."""
    own = np.frombuffer(text.encode(), np.uint8).astype(np.float64)
    first = communicator.rank == 0
    (length,) = sum_arrays(communicator, [np.array([len(own) * first], np.float64)], _LENGTH)
    wire = own if first else np.zeros(int(length[0]))
    (total,) = sum_arrays(communicator, [wire], "syncbn/broadcast/text")
    return total.astype(np.uint8).tobytes().decode()
