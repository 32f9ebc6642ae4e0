"""A tape whose gradients are averaged over the workers."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from syncbn._src.autograph import unconverted
from syncbn._src.communicators.base import Communicator, kept_for
from syncbn._src.communicators.resolution import resolve
from syncbn._src.training.gradient_exchange import Exchange
from syncbn._src.training.kept_local import LocalVariables

_compared: dict[int, set[tuple[str, ...]]] = {}
"""The descriptions of gradients that the workers of a communicator have compared.

Each step creates a new tape."""


class DistributedGradientTape:
    """A `tf.GradientTape` whose `gradient` is the mean over the workers.

    The optimizer is a plain one: `distribute` would average once more. The tape may also be entered
    through this one: ``with DistributedGradientTape(tf.GradientTape()) as tape``. It has only the
    methods below; for a jacobian, which is the worker's own, use the tape itself.

    All workers need gradients for the same sources, in the same order, which is compared for each
    new list of them. Under tf.distribute nothing is averaged here, as with `distribute`; where each
    process has a strategy, the sum that an optimizer takes over its replicas is the mean over the
    processes.

    Args:
        tape: A `tf.GradientTape`.
        communicator: As for `syncbn.SyncBatchNormalization`; resolved when gradients are taken.
        local: The local variables: variables, layers, or a structure of both. See `distribute`.
        scale_local_gradients: Whether to divide their gradients by the number of workers.

    Raises:
        TypeError: ``tape`` is not a tape, or ``local`` has something else in it.
        ValueError: the communicator's name is unknown.

    Example:
        >>> with tf.GradientTape() as tape:
        ...     loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        >>> tape = syncbn.training.DistributedGradientTape(tape)
        >>> gradients = tape.gradient(loss, model.trainable_variables)  # the mean over the workers
        >>> optimizer = tf.keras.optimizers.SGD(0.1)
        >>> step = optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    """

    def __init__(
        self,
        tape: tf.GradientTape,
        communicator: str | Communicator = "auto",
        *,
        local: Any = (),
        scale_local_gradients: bool = True,
    ):
        if not isinstance(tape, tf.GradientTape):
            raise TypeError(f"`tape` must be a tf.GradientTape. Received: tape={tape!r}.")
        self._tape = tape
        self._exchange = Exchange(communicator, LocalVariables(local), scale_local_gradients)

    def __enter__(self) -> DistributedGradientTape:
        self._tape.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tape.__exit__(*exception)

    def watch(self, tensor: Any) -> None:
        """Calls `tf.GradientTape.watch`."""
        self._tape.watch(tensor)

    def watched_variables(self) -> Any:
        """Calls `tf.GradientTape.watched_variables`."""
        return self._tape.watched_variables()

    def stop_recording(self) -> Any:
        """Calls `tf.GradientTape.stop_recording`."""
        return self._tape.stop_recording()

    def reset(self) -> None:
        """Calls `tf.GradientTape.reset`."""
        self._tape.reset()

    @unconverted
    def gradient(self, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the means over the workers of `tf.GradientTape.gradient`. A collective call.

        Args:
            target: What is differentiated on this worker.
            sources: Variables or tensors, or a nested structure of them.
            args: ``output_gradients``, ``unconnected_gradients``.
            kwargs: The same, as keyword arguments.

        Returns:
            The structure of ``sources``, of tensors, `tf.IndexedSlices`, and ``None`` where there
            is no gradient.

        Raises:
            ValueError: workers have different gradients, or numbers of replicas.
            RuntimeError: see `syncbn.resolve`; and `distribute` on local variables.
        """
        flat = tf.nest.flatten(sources)
        gradients = self._tape.gradient(target, flat, *args, **kwargs)
        kinds = self._exchange.kinds(gradients, flat)
        # Others may have compared theirs over another communicator.
        known = kept_for(resolve(self._exchange.communicator), _compared, set)
        self._exchange.compared = kinds in known
        averaged = self._exchange(gradients, flat, "syncbn/tape")
        if self._exchange.compared:
            known.add(kinds)
        return tf.nest.pack_sequence_as(sources, averaged)
