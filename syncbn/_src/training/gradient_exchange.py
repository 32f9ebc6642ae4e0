"""The exchange of gradients between workers, for an optimizer or a tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import (
    Communicator,
    current_size,
    is_resizable,
    process_communicator,
)
from syncbn._src.communicators.host_collectives import require_agreement
from syncbn._src.communicators.resolution import check_communicator, resolve
from syncbn._src.communicators.strategy import local_replicas
from syncbn._src.ops.graphs import in_session
from syncbn._src.training.gradient_averages import Gradient, average_gradients, per_worker
from syncbn._src.training.kept_local import LocalVariables


class Exchange:
    """Averages gradients over the workers, except those of local variables.

    Args:
        communicator: As for `syncbn.SyncBatchNormalization`; resolved at each call.
        local: The variables whose gradients are left out.
        scale_local_gradients: Whether to divide those gradients by the number of workers.

    Raises:
        ValueError, TypeError: no such communicator.
    """

    def __init__(
        self, communicator: str | Communicator, local: LocalVariables, scale_local_gradients: bool
    ):
        self.communicator = check_communicator(communicator)
        self.local = local
        self.scale_local_gradients = scale_local_gradients
        self.compared = False
        """Whether workers know that they have the same gradients; the first call compares them."""

    @property
    def name(self) -> str:
        """The name of the communicator, which is what is saved of it."""
        return self.communicator if isinstance(self.communicator, str) else self.communicator.name

    def kinds(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> tuple[str, ...]:
        """Returns descriptions of the gradients, which must be the same on all workers."""
        local = self._local_among(variables)
        pairs = zip(gradients, local, strict=True)
        return tuple("local" if own else _description(gradient) for gradient, own in pairs)

    def _local_among(self, variables: Sequence[Any]) -> list[bool]:
        return self.local.among(variables) if self.local else [False] * len(variables)

    def __call__(
        self,
        gradients: Sequence[Gradient],
        variables: Sequence[Any],
        name: str,
        *,
        not_finite_together: bool = False,
    ) -> list[Gradient]:
        """Returns the mean of each gradient over all workers, dense or sparse as it was.

        Args:
            gradients: The same ones on all workers; but those of local variables may differ.
            variables: What they are gradients of.
            name: The name of the collectives.
            not_finite_together: Whether a local gradient that is not finite makes those of the
                other workers NaN, so that all of them see it.

        Raises:
            ValueError: workers have different gradients, or numbers of replicas.
            RuntimeError: there are local variables, but a strategy joins the replicas, which share
                all variables; and see `syncbn.resolve`.
        """
        communicator = resolve(self.communicator)
        if communicator.name == "tf.distribute":
            # Optimizers sum gradients over the replicas of a strategy themselves.
            if self.local and communicator.size > 1:
                raise RuntimeError(
                    "Local variables are those of a process. Received: local variables, and "
                    f"{type(tf.distribute.get_strategy()).__name__}, whose {communicator.size} "
                    "replicas share their variables. Use Horovod or MPI."
                )
            return list(gradients)
        resizable = is_resizable(communicator)
        if communicator.size == 1 and not resizable:
            return list(gradients)
        local = self._local_among(variables)
        # Not in the graph of a session, which cannot compute while it is built. In an elastic job
        # only those trace that are new: there `ElasticState` compares the variables.
        if not (self.compared or in_session() or resizable):
            _require_same_gradients(communicator, self.kinds(gradients, variables))
            self.compared = True
        shared = [g for g, own in zip(gradients, local, strict=True) if not own]
        own_gradients = [g for g, own in zip(gradients, local, strict=True) if own]
        if own_gradients and not_finite_together:
            shared.append(_zero_or_nan(own_gradients))
        averages = average_gradients(shared, communicator, name)
        addend = averages.pop() if own_gradients and not_finite_together else None
        workers = 1
        if own_gradients and self.scale_local_gradients:
            workers = current_size(process_communicator(communicator))
        averaged = iter(averages)
        return [
            _scaled(gradient, workers, addend) if own else next(averaged)
            for gradient, own in zip(gradients, local, strict=True)
        ]


def _require_same_gradients(communicator: Communicator, kinds: Sequence[str]) -> None:
    """Raises where workers would average different things."""
    with tf.init_scope():
        require_agreement(
            process_communicator(communicator),
            [*kinds, f"{local_replicas()} replicas"],
            [*(f"gradient {n}" for n in range(len(kinds))), "of a process"],
            "gradients",
        )


def _description(gradient: Gradient) -> str:
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
    finite = [tf.reduce_all(tf.math.is_finite(value)) for value in values]
    return tf.where(tf.reduce_all([True, *finite]), 0.0, float("nan"))


def _scaled(gradient: Gradient, workers: Any, addend: tf.Tensor | None) -> Gradient:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = _scaled(gradient.values, workers, addend)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    scaled = per_worker(gradient, workers)
    return scaled if addend is None else scaled + tf.cast(addend, scaled.dtype)
