"""Optimizers whose gradients are averaged over the workers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from syncbn import keras_api
from syncbn.communicators.base import Communicator, processes
from syncbn.communicators.exchange import require_agreement
from syncbn.communicators.resolve import check, resolve
from syncbn.communicators.strategy import local_replicas
from syncbn.communicators.tracing import unconverted
from syncbn.training.gradients import Gradient, average


def distribute(optimizer: Any, communicator: str | Communicator = "auto") -> Any:
    """Makes an optimizer average its gradients over the workers before it applies them.

    The optimizer itself is changed, and returned: its class becomes a subclass of what it was, and
    state, learning rate and all else stay. The gradients that it is given are averaged first, so
    that clipping, gradient accumulation, loss scaling, weight decay and moving averages of weights
    mean what they mean in one process. A saved model remembers the communicator's name; loading it
    needs no engine, and training it further resolves the name anew.

    All workers need gradients for the same variables, in the same order; the first step compares
    them. The optimizer does not pickle: save the model, or the optimizer's config.

    Under tf.distribute nothing is averaged here: optimizers add gradients up over the replicas of a
    strategy themselves. Where each process of a job over Horovod or MPI has a strategy, with as
    many replicas as the others, it is these sums whose mean over the processes is applied, and
    each process sends one message.

    With mixed precision, distribute the optimizer that scales the loss, not the one inside:
    ``distribute(tf.keras.mixed_precision.LossScaleOptimizer(optimizer))``. It skips steps with
    gradients that are not finite, which all workers have to do together.

    Args:
        optimizer: Of `tf.keras.optimizers` (in Keras 2 also of its ``legacy``), or of
            `tf.compat.v1.train`, or a subclass of one of these.
        communicator: As for `syncbn.SyncBatchNormalization`; resolved when gradients are applied.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: ``optimizer`` is none, or ``communicator`` is none.
        ValueError: it is distributed already, or the communicator's name is unknown. Later, in the
            first step: workers have different gradients, or numbers of replicas.
    """
    check(communicator)
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
    changed: Any = optimizer
    changed.__class__ = _distributed_class(changed.__class__)
    changed._syncbn_communicator = communicator
    changed._syncbn_compared = False
    return changed


def inner_optimizer(optimizer: Any) -> Any:
    """Returns what an optimizer that scales the loss wraps, or ``None``."""
    return getattr(optimizer, "inner_optimizer", None)


def averages_only_inside(optimizer: Any) -> bool:
    """Says whether workers could disagree on which steps to skip.

    Keras wraps an optimizer itself where the policy is ``mixed_float16``. If that one is
    distributed, each worker looks for gradients that are not finite among its own.
    """
    return isinstance(inner_optimizer(optimizer), _Distributed)


@keras_api.register_keras_serializable(package="syncbn", name="DistributedOptimizer")
class _Distributed:
    """What a distributed optimizer has besides its own class."""

    _plain_class: type
    _syncbn_communicator: str | Communicator
    _syncbn_compared: bool

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        communicator = self._syncbn_communicator
        name = communicator if isinstance(communicator, str) else communicator.name
        plain = self._plain_class.from_config(dict(config))  # type: ignore[attr-defined]
        head = keras_api.keras.optimizers.serialize(plain)
        head.pop("config")
        return {**config, "communicator": name, "distributed": head}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        communicator, head = config.pop("communicator"), config.pop("distributed")
        optimizer = keras_api.keras.optimizers.deserialize(
            {**head, "config": config}, custom_objects=custom_objects
        )
        return distribute(optimizer, communicator)

    def _average(self, gradients: Iterable[Gradient]) -> list[Gradient]:
        gradients = list(gradients)
        communicator = resolve(self._syncbn_communicator)
        # Optimizers add gradients up over the replicas of a strategy themselves.
        if communicator.name == "tf.distribute" or communicator.size == 1:
            return gradients
        # Not in the graph of a session, which cannot compute while it is built.
        if not self._syncbn_compared and tf.compat.v1.executing_eagerly_outside_functions():
            with tf.init_scope():
                require_agreement(
                    processes(communicator),
                    [*map(_description, gradients), f"{local_replicas()} replicas"],
                    [*(f"gradient {n}" for n in range(len(gradients))), "of a process"],
                    "gradients",
                )
            self._syncbn_compared = True
        return average(gradients, communicator, f"syncbn/gradients/{type(self).__name__}")


class _ByApply(_Distributed):
    """Optimizers of Keras 3."""

    @unconverted
    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return super().apply(self._average(grads), trainable_variables)  # type: ignore[misc]


class _ByApplyGradients(_Distributed):
    """Optimizers of Keras 2 and of tf.compat.v1."""

    @unconverted
    def apply_gradients(self, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        grads_and_vars = list(grads_and_vars)
        gradients = self._average(gradient for gradient, _ in grads_and_vars)
        averaged = [(mean, v) for mean, (_, v) in zip(gradients, grads_and_vars, strict=True)]
        return super().apply_gradients(averaged, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _distributed_class(cls: type) -> type:
    base = _ByApply if hasattr(cls, "apply") else _ByApplyGradients
    # The metaclass is that of `cls`; what users see of the class is what they see of `cls`.
    members = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    made = type(cls)(cls.__name__, (base, cls), {**members, "_plain_class": cls})
    return keras_api.register_keras_serializable("syncbn", "DistributedOptimizer")(made)


def _description(gradient: Gradient) -> str:
    if gradient is None:
        return "none"
    if isinstance(gradient, tf.IndexedSlices):
        return f"sparse {gradient.dtype.name}"
    return f"dense {gradient.dtype.name} {gradient.shape}"
