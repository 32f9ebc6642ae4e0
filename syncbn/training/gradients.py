"""Averages of gradients over workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn.communicators.base import Communicator
from syncbn.communicators.horovod import HorovodCommunicator

Gradient = Any
"""A `tf.Tensor`, a `tf.IndexedSlices` or ``None``."""


def average(gradients: Sequence[Gradient], communicator: Communicator, name: str) -> list[Gradient]:
    """Returns the means over all workers of gradients, each in its own form.

    Dense ones travel together: over Horovod in one grouped all-reduce for each dtype, elsewhere in
    one flat buffer for each dtype. Sparse ones (`tf.IndexedSlices`) stay sparse: the slices of all
    workers, one after the other.

    Args:
        gradients: The same ones on all workers; the number of slices of a sparse one may differ.
            ``None``, where there is no gradient, stays ``None``.
        communicator: What joins the workers.
        name: Of the collectives.
    """
    averages: list[Gradient] = [None] * len(gradients)
    dense: dict[tf.DType, list[int]] = {}
    sparse: list[int] = []
    for index, gradient in enumerate(gradients):
        if isinstance(gradient, tf.IndexedSlices):
            sparse.append(index)
        elif gradient is not None:
            dense.setdefault(gradient.dtype, []).append(index)
    for dtype, indices in dense.items():
        totals = _sum([gradients[index] for index in indices], communicator, f"{name}/{dtype.name}")
        for index, total in zip(indices, totals, strict=True):
            averages[index] = total / communicator.size
    if sparse:
        gathered = _gather([gradients[index] for index in sparse], communicator, f"{name}/sparse")
        for index, slices in zip(sparse, gathered, strict=True):
            averages[index] = tf.IndexedSlices(
                slices.values / communicator.size, slices.indices, slices.dense_shape
            )
    return averages


def _sum(tensors: list[tf.Tensor], communicator: Communicator, name: str) -> list[tf.Tensor]:
    if isinstance(communicator, HorovodCommunicator):
        return communicator.grouped_all_reduce_sum(tensors, name)
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    total = communicator.all_reduce_sum(flat, name)
    parts = tf.split(total, [tf.size(tensor) for tensor in tensors])
    return [
        tf.ensure_shape(tf.reshape(part, tf.shape(tensor)), tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _gather(
    gradients: list[tf.IndexedSlices], communicator: Communicator, name: str
) -> list[tf.IndexedSlices]:
    # A gathering is a sum in which each worker fills the rows of its own and leaves the others
    # zero; its cost is twice that of a gathering proper, and every communicator can do it.
    size, rank = communicator.size, communicator.rank
    own = tf.stack([tf.shape(gradient.indices, tf.int64)[0] for gradient in gradients])
    rows = tf.pad(own[tf.newaxis], [[rank, size - 1 - rank], [0, 0]])
    counts = tf.cast(
        communicator.all_reduce_sum(tf.cast(rows, tf.float64), f"{name}/counts"), tf.int64
    )
    gathered = []
    for number, gradient in enumerate(gradients):
        before = tf.reduce_sum(counts[:rank, number])
        after = tf.reduce_sum(counts[rank + 1 :, number])

        def everyone(tensor: tf.Tensor, part: str, before=before, after=after, number=number):  # type: ignore[no-untyped-def]
            padding = [[before, after]] + [[0, 0]] * (tensor.shape.rank - 1)
            return communicator.all_reduce_sum(tf.pad(tensor, padding), f"{name}/{number}/{part}")

        # float64 holds every index of a table that fits into memory.
        indices = everyone(tf.cast(gradient.indices, tf.float64), "indices")
        gathered.append(
            tf.IndexedSlices(
                everyone(gradient.values, "values"),
                tf.cast(indices, gradient.indices.dtype),
                gradient.dense_shape,
            )
        )
    return gathered
