"""The other replicas, as the operations see them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tensorflow as tf

from syncbn._src.ops.moments import Moments, Sums, pack, unbiased, unpack
from syncbn._src.ops.shared_traces import shared


class Replicas:
    """All that the operations need to know of the other replicas: how to sum over them.

    Args:
        all_reduce_sum: Sums a tensor over all replicas, differentiably; the name is the same on
            each of them for the same call.
        alone: Whether there are no others.
    """

    def __init__(self, all_reduce_sum: Callable[[tf.Tensor, str], tf.Tensor], alone: bool = False):
        self.all_reduce_sum = all_reduce_sum
        self.alone = alone

    def merge(self, sums: Sums, bessel: bool = False) -> tuple[Moments, Moments]:
        """Returns the moments to normalize with, and those for the moving statistics.

        Args:
            sums: This replica's own.
            bessel: Whether the latter have the unbiased variance.
        """
        total = self.all_reduce_sum(pack(sums), "statistics")
        like = Sums(*(None if part is None else tf.TensorSpec(part.shape) for part in sums))
        merged = _unpacking(like)(total)
        return merged, unbiased(merged) if bessel else merged


@functools.cache
def _unpacking(like: Sums) -> Callable[[tf.Tensor], Moments]:
    return shared(lambda packed: unpack(packed, like))
