"""Optimizers whose gradients are averaged over the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.autograph import unconverted
from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.disguised_classes import disguised_class
from syncbn._src.keras_compat.optimizer_state import (
    build_optimizer,
    inner_optimizer,
    serialized_class,
    trained_variables,
)
from syncbn._src.training.accumulation import Accumulation
from syncbn._src.training.gradient_averages import Gradient
from syncbn._src.training.gradient_exchange import Exchange
from syncbn._src.training.kept_local import LocalVariables, local_variables


def distribute(
    optimizer: Any,
    communicator: str | Communicator = "auto",
    *,
    local: Any = (),
    scale_local_gradients: bool = True,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
) -> Any:
    """Makes an optimizer average its gradients over the workers before it applies them.

    The optimizer itself is changed, and returned: its class becomes a subclass of what it was, and
    state, learning rate and all else stay. The gradients that it is given are averaged first, so
    that clipping, gradient accumulation, loss scaling, weight decay and moving averages of weights
    work as in one process. A saved model remembers the communicator's name; loading it needs no
    engine, and further training resolves the name again.

    All workers need gradients for the same variables, in the same order; the first step compares
    them. The optimizer cannot be pickled: save the model, or the optimizer's config.

    Under tf.distribute nothing is averaged here: optimizers sum gradients over the replicas of a
    strategy themselves. Where each process of a job over Horovod or MPI has a strategy, with as
    many replicas as the others, the mean of these sums over the processes is applied, and each
    process sends one message.

    With mixed precision, distribute the optimizer that scales the loss, not the one inside:
    ``distribute(tf.keras.mixed_precision.LossScaleOptimizer(optimizer))``. It skips steps with
    gradients that are not finite, which all workers have to do together.

    **Local variables** are each worker's own, as where each has another part of a model: their
    gradients are not averaged, and `BroadcastVariables` leaves them and their state alone. They may
    have different shapes on different workers. Their gradient is divided by the number of workers:
    then it is that of the mean over the workers' losses, as in one process that had the variables
    of all. A loaded optimizer must be told again: ``optimizer.register_local_var(layer)``, which
    adds local variables, and can be called on any distributed optimizer.

    **Several backward passes for one step**: gradients are summed on each worker, and only at every
    ``backward_passes_per_step``-th call are the sums exchanged, in one exchange, and applied; the
    other calls change nothing. Only applied steps count, for Keras' learning-rate schedules too.
    This is not Keras 3's ``gradient_accumulation_steps``, which exchanges at each call.

    Args:
        optimizer: One of `tf.keras.optimizers` (in Keras 2 also of its ``legacy``), or of
            `tf.compat.v1.train`, or a subclass of one of these.
        communicator: As for `syncbn.SyncBatchNormalization`; resolved when gradients are applied.
        local: The local variables: layers, with all of their weights, built or not; variables; or a
            structure of both.
        scale_local_gradients: Whether to divide local gradients by the number of workers.
        backward_passes_per_step: The number of calls that make a step.
        average_aggregated_gradients: Whether a step takes the mean of its calls' gradients, not
            their sum.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, ``communicator`` is not a communicator, or
            ``local`` has something else in it.
        ValueError: it is distributed already, the communicator's name is unknown, or
            ``backward_passes_per_step`` is not a positive integer. Later, in a step: workers have
            different gradients, or numbers of replicas; or the optimizer clips by the norm of all
            gradients and has local variables, which other workers do not know.
        RuntimeError: in a step: there are local variables, and only a strategy joins the replicas;
            and see `syncbn.resolve`.
        NotImplementedError: in a step: ``backward_passes_per_step`` with a strategy that has
            several replicas, or in a graph could have (all but OneDeviceStrategy), or in a session.

    Example:
        >>> optimizer = syncbn.training.distribute(tf.keras.optimizers.SGD(0.1))
        >>> model.compile(optimizer, "mse")
    """
    if not isinstance(optimizer, (*keras_api.OPTIMIZERS, tf.compat.v1.train.Optimizer)):
        raise TypeError(
            "`optimizer` must be one of tf.keras.optimizers or tf.compat.v1.train. "
            f"Received: optimizer={optimizer!r}."
        )
    if any(isinstance(one, _Distributed) for one in (optimizer, inner_optimizer(optimizer))):
        raise ValueError(
            "`optimizer` must not be distributed already, or its gradients would be averaged "
            f"twice. Received: optimizer={optimizer!r}."
        )
    passes = at_least_one("backward_passes_per_step", backward_passes_per_step)
    # Kept in objects: Keras would track variables and lists that are the optimizer's attributes.
    exchange = Exchange(communicator, LocalVariables(local), scale_local_gradients)
    changed: Any = optimizer
    mixin = _ByApply if hasattr(optimizer, "apply") else _ByApplyGradients
    changed.__class__ = disguised_class(mixin, changed.__class__, "DistributedOptimizer")
    changed._syncbn_exchange = exchange
    changed._syncbn_accumulation = Accumulation(passes, average_aggregated_gradients)
    return changed


def require_averages_of_scaled(optimizer: Any) -> None:
    """Refuses an optimizer that scales the loss around a distributed one.

    Keras wraps an optimizer itself where the policy is ``mixed_float16``. If that one is
    distributed, each worker looks for gradients that are not finite among its own.

    Raises:
        RuntimeError: workers could disagree on which steps to skip.
    """
    if isinstance(inner_optimizer(optimizer), _Distributed):
        raise RuntimeError(
            "With mixed precision, distribute the optimizer that scales the loss: "
            "compile(distribute(tf.keras.mixed_precision.LossScaleOptimizer(optimizer))). "
            f"Received: {type(optimizer).__name__} around a distributed optimizer, with which "
            "workers would skip different steps."
        )


@keras_api.register_keras_serializable(package="syncbn", name="DistributedOptimizer")
class _Distributed:
    """Mixin for the class of a distributed optimizer."""

    _plain_class: type
    _syncbn_exchange: Exchange
    _syncbn_accumulation: Accumulation

    def register_local_var(self, var: Any) -> None:
        """Makes variables local: see `distribute`.

        Args:
            var: A variable, a layer, or a structure of them.
        """
        self._syncbn_exchange.local.add(var)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        local = self._syncbn_exchange.local
        return {
            **config,
            "distributed": serialized_class(self._plain_class),
            "communicator": self._syncbn_exchange.name,
            "has_local_variables": bool(local) or local.forgotten,
            "scale_local_gradients": self._syncbn_exchange.scale_local_gradients,
            "backward_passes_per_step": self._syncbn_accumulation.passes,
            "average_aggregated_gradients": self._syncbn_accumulation.mean,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        head = config.pop("distributed")
        has_local = config.pop("has_local_variables")
        options = {name: config.pop(name) for name in _OPTIONS}
        optimizer = keras_api.keras.optimizers.deserialize(
            {**head, "config": config}, custom_objects=custom_objects
        )
        distributed = distribute(optimizer, **options)
        distributed._syncbn_exchange.local.forgotten = has_local
        return distributed

    def _step(
        self,
        gradients: Sequence[Gradient],
        variables: Sequence[Any],
        apply: Callable[[list[Gradient]], Any],
    ) -> Any:
        """Applies the averages of gradients, if all passes of a step have been made."""
        self._require_known_norms()
        if self._syncbn_accumulation.passes == 1:
            return apply(self._average(gradients, variables))
        # In a branch no optimizer can create its state.
        build_optimizer(self, variables)
        self._syncbn_accumulation.add(
            gradients, variables, lambda sums: apply(self._average(sums, variables))
        )
        return getattr(self, "iterations", None)

    def _average(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        return self._syncbn_exchange(
            gradients,
            variables,
            f"syncbn/gradients/{type(self).__name__}",
            not_finite_together=inner_optimizer(self) is not None,
        )

    def _require_known_norms(self) -> None:
        """Raises where workers would clip shared variables by different norms."""
        if not local_variables(self):
            return
        for one in (self, inner_optimizer(self)):
            norm = getattr(one, "global_clipnorm", None)
            if norm is not None:
                raise ValueError(
                    "With local variables, an optimizer must not clip by the norm of all "
                    "gradients, which differs from worker to worker. Received: "
                    f"global_clipnorm={norm}. Use clipnorm or clipvalue."
                )


_OPTIONS = (
    "communicator",
    "scale_local_gradients",
    "backward_passes_per_step",
    "average_aggregated_gradients",
)


class _ByApply(_Distributed):
    """Optimizers of Keras 3."""

    @unconverted
    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        variables = trained_variables(self, trainable_variables)
        # Passed on as it came: without variables Keras checks the number of gradients.
        return self._step(
            list(grads),
            variables,
            lambda averages: super(_ByApply, self).apply(averages, trainable_variables),  # type: ignore[misc]
        )


class _ByApplyGradients(_Distributed):
    """Optimizers of Keras 2 and of tf.compat.v1."""

    @unconverted
    def apply_gradients(self, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = list(grads_and_vars)
        variables = [variable for _, variable in pairs]
        return self._step(
            [gradient for gradient, _ in pairs],
            variables,
            lambda averages: super(_ByApplyGradients, self).apply_gradients(  # type: ignore[misc]
                list(zip(averages, variables, strict=True)), *args, **kwargs
            ),
        )
