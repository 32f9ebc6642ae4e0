"""What a checkpoint has of a model and its optimizer, and which ones it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.optimizer_state import create_optimizer_state, optimizer_kind
from syncbn._src.training.kept_local import local_variables


class CheckpointContents:
    """The variables of a model and its optimizer, whose state exists from now on.

    Args:
        model: A model.
        optimizer: Its optimizer, or ``None``.
        workers: Those that have the same of both.

    Raises:
        ValueError: the model is not built; or the optimizer keeps variables local, which are not
            the same on all workers.
    """

    def __init__(self, model: Any, optimizer: Any, workers: Communicator):
        if not model.built:
            raise ValueError(
                "The model must be built, or its weights cannot be restored. Received: "
                f"{model.name}, which is not. Give it an Input, or call it on a batch first."
            )
        if workers.size > 1 and local_variables(optimizer):
            raise ValueError(
                "One checkpoint is for all workers. Received: an optimizer with variables that "
                "each worker has for itself. Save these by a callback of your own."
            )
        weights: Sequence[Any] = [keras_api.variable(weight) for weight in model.weights]
        self._shapes = [str(tuple(weight.shape)) for weight in model.weights]
        self._optimizer = None
        contents: dict[str, Any] = {"weights": weights}
        if optimizer is not None:
            create_optimizer_state(optimizer, model.trainable_variables)
            self._optimizer = optimizer_kind(optimizer)
            contents["optimizer"] = optimizer
        self.variables = tf.train.Checkpoint(**contents)

    def described(self) -> dict[str, Any]:
        """Returns what is written beside the variables, and compared before they are read."""
        return {"weights": self._shapes, "optimizer": self._optimizer}

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
        if progress["optimizer"] != self._optimizer:
            raise ValueError(
                "A checkpoint must be of this model and optimizer. Received: one of "
                f"{_kind(progress['optimizer'])} in {path}, for {_kind(self._optimizer)}. Name "
                "another folder."
            )


def _kind(optimizer: dict[str, list[str]] | None) -> str:
    """Says in words what `optimizer_kind` has found."""
    if optimizer is None:
        return "no optimizer"
    classes, shapes = " around ".join(optimizer["classes"]), ", ".join(optimizer["shapes"])
    return f"{classes}, with variables of {shapes}"
