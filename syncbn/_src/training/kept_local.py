"""Local variables: those that workers do not share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.optimizer_state import state_of
from syncbn._src.training.model_optimizers import optimizers_of


class LocalVariables:
    """The variables that are not averaged and not broadcast.

    Args:
        given: Layers, for all of their weights, also those not created yet; variables; or nested
            structures of both.

    Raises:
        TypeError: something else was given.
    """

    def __init__(self, given: Any = ()):
        self._given: list[Any] = []
        self.forgotten = False
        """Whether there are some that are not known, as in an optimizer that was loaded."""
        self.add(given)

    def __bool__(self) -> bool:
        return bool(self._given)

    def add(self, given: Any) -> None:
        """Makes more variables local."""
        for one in tf.nest.flatten(given):
            if not isinstance(one, (*keras_api.VARIABLES, keras_api.keras.layers.Layer)):
                raise TypeError(
                    "What is local must be variables or layers of tf.keras. "
                    f"Received: {one!r} of type {type(one).__name__}."
                )
            self._given.append(one)
        self.forgotten = False

    def variables(self) -> list[Any]:
        """Returns those that exist now."""
        layer = keras_api.keras.layers.Layer
        return [
            variable
            for one in self._given
            for variable in (one.weights if isinstance(one, layer) else [one])
        ]

    def among(self, variables: Iterable[Any]) -> list[bool]:
        """Says of each variable whether it is local."""
        own = {id(keras_api.variable(variable)) for variable in self.variables()}
        return [id(keras_api.variable(variable)) in own for variable in variables]


def shared_variables(variables: Sequence[Any], optimizers: Iterable[Any]) -> list[Any]:
    """Returns ``variables`` without those that one of the ``optimizers`` keeps local.

    Its state for those is left out too.

    Raises:
        ValueError: see `local_variables`; or it is not known which state belongs to them.
    """
    left = list(variables)
    for optimizer in optimizers:
        local = local_variables(optimizer)
        if local:
            theirs = local.variables()
            local = LocalVariables([*theirs, *state_of(optimizer, theirs)])
            left = [v for v, own in zip(left, local.among(left), strict=True) if not own]
    return left


def local_in(model: Any) -> LocalVariables:
    """Returns the variables that one of a model's optimizers keeps local.

    Raises:
        ValueError: see `local_variables`.
    """
    optimizers = optimizers_of(model, getattr(model, "optimizer", None)).values()
    return LocalVariables([local_variables(one).variables() for one in optimizers])


def local_variables(optimizer: Any) -> LocalVariables:
    """Returns the variables that an optimizer keeps local, if any.

    Raises:
        ValueError: the optimizer was loaded, and has not been told which they are.
    """
    exchange = getattr(optimizer, "_syncbn_exchange", None)
    local = LocalVariables() if exchange is None else exchange.local
    if local.forgotten:
        raise ValueError(
            "A loaded optimizer must be told which variables are local. Received: one that was "
            "saved with some. Before training, call "
            "model.optimizer.register_local_var(variables_or_layers) on every worker."
        )
    return local
