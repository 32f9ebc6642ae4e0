"""What workers do with the gradients of a step, in an optimizer or from a tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn.communicators.base import Communicator, processes
from syncbn.communicators.exchange import require_agreement
from syncbn.communicators.resolve import check, resolve
from syncbn.communicators.strategy import local_replicas
from syncbn.training.gradients import Gradient, average
from syncbn.training.local import LocalVariables


class Exchange:
    """Averages gradients over the workers, but for those of local variables.

    Args:
        communicator: As for `syncbn.SyncBatchNormalization`; resolved at each call.
        local: What is left out.
        scale_local_gradients: Whether to divide what is left out by the number of workers.

    Raises:
        ValueError, TypeError: no such communicator.
    """

    def __init__(
        self, communicator: str | Communicator, local: LocalVariables, scale_local_gradients: bool
    ):
        self.communicator = check(communicator)
        self.local = local
        self.scale_local_gradients = scale_local_gradients

    @property
    def name(self) -> str:
        """The name of the communicator, which is what is saved of it."""
        return self.communicator if isinstance(self.communicator, str) else self.communicator.name

    def __call__(
        self,
        gradients: Sequence[Gradient],
        variables: Sequence[Any],
        name: str,
        *,
        compare: bool,
        not_finite_together: bool = False,
    ) -> list[Gradient]:
        """Returns the means over all workers of gradients, each in its own form.

        Args:
            gradients: The same ones on all workers; but those of local variables may differ.
            variables: What they are gradients of.
            name: Of the collectives.
            compare: Whether to compare them over the workers first.
            not_finite_together: Whether a local gradient that is not finite makes those of the
                other workers NaN, so that all of them see it.

        Raises:
            ValueError: workers have different gradients, or numbers of replicas.
            RuntimeError: there are local variables, and a strategy joins the replicas, which share
                theirs; and see `syncbn.resolve`.
        """
        communicator = resolve(self.communicator)
        if communicator.name == "tf.distribute":
            # Optimizers add gradients up over the replicas of a strategy themselves.
            if self.local and communicator.size > 1:
                raise RuntimeError(
                    "Local variables are those of a process. Received: local variables, and "
                    f"{type(tf.distribute.get_strategy()).__name__}, whose {communicator.size} "
                    "replicas share their variables. Use Horovod or MPI."
                )
            return list(gradients)
        if communicator.size == 1:
            return list(gradients)
        local = self.local.among(variables) if self.local else [False] * len(gradients)
        if compare:
            _require_same_gradients(communicator, gradients, local)
        shared = [g for g, own in zip(gradients, local, strict=True) if not own]
        own_gradients = [g for g, own in zip(gradients, local, strict=True) if own]
        if own_gradients and not_finite_together:
            shared.append(_zero_or_nan(own_gradients))
        averages = average(shared, communicator, name)
        addend = averages.pop() if own_gradients and not_finite_together else None
        workers = processes(communicator).size if self.scale_local_gradients else 1
        averaged = iter(averages)
        return [
            _scaled(gradient, workers, addend) if own else next(averaged)
            for gradient, own in zip(gradients, local, strict=True)
        ]


def _require_same_gradients(
    communicator: Communicator, gradients: Sequence[Gradient], local: Sequence[bool]
) -> None:
    """Raises where workers would average different things."""
    # Not in the graph of a session, which cannot compute while it is built.
    if not tf.compat.v1.executing_eagerly_outside_functions():
        return
    kinds = [
        "local" if own else description(gradient)
        for gradient, own in zip(gradients, local, strict=True)
    ]
    with tf.init_scope():
        require_agreement(
            processes(communicator),
            [*kinds, f"{local_replicas()} replicas"],
            [*(f"gradient {n}" for n in range(len(gradients))), "of a process"],
            "gradients",
        )


def description(gradient: Gradient) -> str:
    """Returns what must be the same of a gradient on all workers."""
    if gradient is None:
        return "none"
    if isinstance(gradient, tf.IndexedSlices):
        return f"sparse {gradient.dtype.name}"
    return f"dense {gradient.dtype.name} {gradient.shape}"


def _zero_or_nan(gradients: Sequence[Gradient]) -> tf.Tensor:
    """Returns a zero that is a NaN where a gradient is not finite."""
    values = [
        gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        for gradient in gradients
        if gradient is not None
    ]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])
    return tf.where(finite, 0.0, float("nan"))


def _scaled(gradient: Gradient, workers: int, addend: tf.Tensor | None) -> Gradient:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = _scaled(gradient.values, workers, addend)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    scaled = gradient / workers
    return scaled if addend is None else scaled + tf.cast(addend, scaled.dtype)
