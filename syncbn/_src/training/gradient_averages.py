"""Averages of gradients over workers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator, current_rank, current_size, wire_dtype
from syncbn._src.communicators.fingerprints import sums
from syncbn._src.communicators.horovod import HorovodCommunicator
from syncbn._src.ops.graphs import in_branch_or_loop

Gradient = Any
"""A `tf.Tensor`, a `tf.IndexedSlices` or ``None``."""


def average_gradients(
    gradients: Sequence[Gradient], communicator: Communicator, name: str
) -> list[Gradient]:
    """Returns the mean of each gradient over all workers, dense or sparse as it was.

    Dense ones are reduced together: over Horovod in one grouped all-reduce for each dtype;
    elsewhere, and in branches and loops, in one flat buffer for each dtype. Sparse ones
    (`tf.IndexedSlices`) stay sparse: the slices of all workers, one after the other.

    Args:
        gradients: The same ones on all workers; the number of slices of a sparse one may differ.
            ``None``, where there is no gradient, stays ``None``.
        communicator: The communicator of the workers.
        name: The name of the collectives.
    """
    averages: list[Gradient] = [None] * len(gradients)
    dense: dict[tf.DType, list[int]] = {}
    sparse: list[int] = []
    for index, gradient in enumerate(gradients):
        if isinstance(gradient, tf.IndexedSlices):
            sparse.append(index)
        elif gradient is not None:
            dense.setdefault(wire_dtype(gradient.dtype), []).append(index)
    workers = current_size(communicator)
    for dtype, indices in dense.items():
        wires = [tf.cast(gradients[index], dtype) for index in indices]
        totals = _sum(wires, communicator, f"{name}/{dtype.name}")
        for index, total in zip(indices, totals, strict=True):
            averages[index] = tf.cast(per_worker(total, workers), gradients[index].dtype)
    if sparse:
        own = [gradients[index] for index in sparse]
        gathered = _gather(own, communicator, f"{name}/sparse")
        for index, slices in zip(sparse, gathered, strict=True):
            averages[index] = tf.IndexedSlices(
                tf.cast(per_worker(slices.values, workers), gradients[index].dtype),
                slices.indices,
                slices.dense_shape,
            )
    return averages


def per_worker(total: tf.Tensor, workers: Any) -> tf.Tensor:
    """Returns a total divided by the number of workers, an integer or a tensor."""
    return total / tf.cast(workers, total.dtype)


def _sum(tensors: list[tf.Tensor], communicator: Communicator, name: str) -> list[tf.Tensor]:
    # A grouped all-reduce is not kept in order: iterations of a loop, which TensorFlow runs in
    # parallel, would be matched with one another, as they share its name.
    if isinstance(communicator, HorovodCommunicator) and not in_branch_or_loop():
        return communicator.grouped_all_reduce_sum(tensors, name)
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    # The same gradients in another order may have the same length in all. Over MPI another name is
    # an error on all workers; over Horovod they would wait for ever.
    if communicator.name != "horovod":
        shapes = ", ".join(str(tensor.shape) for tensor in tensors)
        name = f"{name}/{zlib.crc32(shapes.encode()):08x}"
    total = sums(communicator)(flat, name)
    parts = tf.split(total, [tf.size(tensor) for tensor in tensors])
    return [
        tf.ensure_shape(tf.reshape(part, tf.shape(tensor)), tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _gather(
    gradients: list[tf.IndexedSlices], communicator: Communicator, name: str
) -> list[tf.IndexedSlices]:
    # An all-gather as a sum, in which each worker fills its own rows and leaves the others zero: at
    # twice the cost of an all-gather proper, but every communicator can do it.
    size, rank = current_size(communicator), current_rank(communicator)
    own = tf.stack([tf.shape(gradient.indices, tf.int64)[0] for gradient in gradients])
    rows = tf.pad(own[tf.newaxis], [[rank, size - 1 - rank], [0, 0]])
    add_up = sums(communicator)
    counts = tf.cast(add_up(tf.cast(rows, tf.float64), f"{name}/counts"), tf.int64)
    gathered = []
    for number, gradient in enumerate(gradients):
        padding = [tf.reduce_sum(counts[:rank, number]), tf.reduce_sum(counts[rank + 1 :, number])]
        # float64 represents every index of a table that fits into memory.
        indices, values = (
            add_up(
                tf.pad(tensor, [padding, *[[0, 0]] * (tensor.shape.rank - 1)]),
                f"{name}/{number}/{part}",
            )
            for part, tensor in (
                ("indices", tf.cast(gradient.indices, tf.float64)),
                ("values", tf.cast(gradient.values, wire_dtype(gradient.dtype))),
            )
        )
        indices = tf.cast(indices, gradient.indices.dtype)
        gathered.append(tf.IndexedSlices(values, indices, gradient.dense_shape))
    return gathered
