"""What a checkpoint has of a model and its optimizers, and which ones it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.optimizer_state import (
    finds_state_by_variable,
    optimizer_kind,
    optimizer_variables,
)
from syncbn._src.training.kept_local import local_variables
from syncbn._src.training.model_optimizers import create_states


class CheckpointContents:
    """The variables of a model and its optimizers, whose state exists from now on.

    Args:
        model: A model.
        optimizers: Its optimizers, by their names: see `optimizers_of`.
        workers: Those that have the same of both.

    Raises:
        ValueError: the model is not built; or an optimizer keeps variables local, which are not
            the same on all workers; or one of several is not built, see `create_states`.
    """

    def __init__(self, model: Any, optimizers: Mapping[str, Any], workers: Communicator):
        if not model.built:
            raise ValueError(
                "The model must be built, or its weights cannot be restored. Received: "
                f"{model.name}, which is not. Give it an Input, or call it on a batch first."
            )
        if workers.size > 1 and any(map(local_variables, optimizers.values())):
            raise ValueError(
                "One checkpoint is for all workers. Received: an optimizer with variables that "
                "each worker has for itself. Save these by a callback of your own."
            )
        weights: Sequence[Any] = [keras_api.variable(weight) for weight in model.weights]
        self._shapes = [str(tuple(weight.shape)) for weight in model.weights]
        create_states(optimizers, model.trainable_variables)
        self._kinds = {name: optimizer_kind(one) for name, one in optimizers.items()}
        self.variables = tf.train.Checkpoint(
            weights=weights,
            optimizers=dict(optimizers),
            **{f"rest of {name}": _untracked(one) for name, one in optimizers.items()},
        )

    def described(self) -> dict[str, Any]:
        """Returns what is written beside the variables, and compared before they are read."""
        return {"weights": self._shapes, "optimizers": self._kinds}

    def require_of_this_model(self, progress: dict[str, Any], path: str) -> None:
        """Raises a ValueError where a checkpoint is of another model or optimizer.

        Args:
            progress: What it says, as `described`.
            path: Where it is.
        """
        if progress["weights"] != self._shapes:
            raise ValueError(
                "A checkpoint must be of this model. Received: one of weights with the shapes "
                f"{', '.join(progress['weights'])} in {path}, for a model with "
                f"{', '.join(self._shapes)}. Name another folder."
            )
        if progress["optimizers"] != self._kinds:
            raise ValueError(
                "A checkpoint must be of this model and optimizer. Received: one of "
                f"{_in_words(progress['optimizers'])} in {path}, for {_in_words(self._kinds)}. "
                "Name another folder."
            )


def _untracked(optimizer: Any) -> list[Any]:
    """Returns the state that TensorFlow does not find: what Keras 3's MultiOptimizer is made of."""
    if finds_state_by_variable(optimizer):
        return []  # it finds that by the variable, too, and takes it in no other way
    tracked = {id(one) for one in tf.train.TrackableView(optimizer).descendants()}
    state = optimizer_variables(optimizer)
    return [keras_api.variable(one) for one in state if id(one) not in tracked]


def _in_words(kinds: Mapping[str, dict[str, list[str]]]) -> str:
    """Says in words what `optimizer_kind` has found of each optimizer."""
    found = []
    for name, kind in kinds.items():
        classes, shapes = " around ".join(kind["classes"]), ", ".join(kind["shapes"])
        found.append(f"{classes} as `{name}`, with variables of {shapes}")
    return "; ".join(found) or "no optimizer"
