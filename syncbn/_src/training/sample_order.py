"""The order of the samples: a function of seed and epoch, whatever the number of workers."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class SampleOrder(NamedTuple):
    """How all workers together go through the samples.

    Step ``t`` of an epoch has the samples at the places ``t * batch_size`` to ``(t + 1) *
    batch_size - 1`` of the order of that epoch.
    """

    samples: int
    batch_size: int
    """That of all workers together."""
    seed: int | None
    """``None`` for the order of their numbers, in each epoch."""

    @property
    def steps(self) -> int:
        """The steps of an epoch. Samples that do not fill a batch are left out."""
        return self.samples // self.batch_size

    def steps_behind(self, seen: int) -> int:
        """Returns the steps of an epoch in which ``seen`` samples have been seen already."""
        return max(self.samples - seen, 0) // self.batch_size

    def batches(
        self, epoch: int, seen: int, epochs: int, rank: int = 0, size: int = 1
    ) -> tf.data.Dataset:
        """Returns a worker's batches of sample numbers, int64 ``(batch_size / size,)``.

        Args:
            epoch: The first epoch.
            seen: The number of samples that have been seen in it, from the beginning of its order.
            epochs: The epoch to end before.
            rank: The number of the worker. It has every ``size``-th sample of each batch.
            size: The number of workers, which divides ``batch_size``.
        """
        first = self.steps_behind(seen)
        total = max(first + (epochs - epoch - 1) * self.steps, 0) if epoch < epochs else 0

        def batch(step: tf.Tensor) -> tf.Tensor:
            later = step - first  # its number among the steps of the epochs that follow
            begun = later < 0
            number = tf.where(begun, tf.constant(epoch, tf.int64), epoch + 1 + later // self.steps)
            place = tf.where(
                begun, seen + step * self.batch_size, later % self.steps * self.batch_size
            )
            places = place + tf.range(rank, self.batch_size, size, tf.int64)
            return places if self.seed is None else self._shuffled(places, number)

        # Keras counts the steps that it is let pass among those that a dataset of a known size has.
        return tf.data.Dataset.range(total).map(batch).filter(lambda numbers: True)

    def _shuffled(self, places: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        # Stateless: seeds that workers have of their own change nothing.
        seed = tf.stack([tf.constant(self.seed, tf.int64), epoch])
        return tf.random.experimental.index_shuffle(
            places, seed, tf.constant(self.samples - 1, tf.int64)
        )
