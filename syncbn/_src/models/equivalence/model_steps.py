"""What replicas run: a model forward and backward, and its own training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.optimizer_state import leave_gradients
from syncbn._src.models.equivalence.batch_replicas import BatchReplicas
from syncbn._src.training.model_optimizers import optimizers_of

_STEPS = 32
"""After this many an optimizer must have changed something: dynamic loss scaling skips steps until
its scale fits."""


def floating(structure: Any) -> list[Any]:
    """Returns the leaves that have a gradient."""
    return [v for v in tf.nest.flatten(structure) if tf.as_dtype(v.dtype).is_floating]


def forward(model: Any) -> Callable[[Any], list[tf.Tensor]]:
    """Returns a step that gives the floating outputs of ``model`` in training."""

    def step(data: dict[str, Any]) -> list[tf.Tensor]:
        return [tf.identity(y) for y in floating(model(data["x"], training=True))]

    return step


def forward_backward(model: Any, loss: Any, samples: int) -> Callable[[Any], Any]:
    """Returns a step that gives outputs, input gradients and parameter gradients.

    Args:
        model: The model, which is trained on ``data["x"]``.
        loss: A function of ``data["y"]`` and the outputs, or ``None`` for the sum of the outputs
            times ``data["projections"]``. A loss for each sample is averaged over all replicas; a
            scalar is a replica's share of the sum.
        samples: The number of samples on all replicas together.
    """

    def step(data: dict[str, Any]) -> Any:
        inputs = floating(data["x"])
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            predictions = model(data["x"], training=True)
            outputs = floating(predictions)
            if loss is None:
                pairs = zip(outputs, data["projections"], strict=True)
                value = tf.add_n([tf.reduce_sum(tf.cast(y, p.dtype) * p) for y, p in pairs])
            else:
                value = tf.convert_to_tensor(loss(data.get("y"), predictions))
                if value.shape.rank:
                    elements = samples * np.prod(value.shape[1:].as_list(), dtype=int)
                    value = tf.reduce_sum(tf.cast(value, tf.float32)) / elements
        gradients = tape.gradient(
            value, [*inputs, *model.trainable_variables], unconnected_gradients="zero"
        )
        # Strategies tell the results of replicas apart by identity, but a sum may be one tensor.
        gradients = [tf.identity(gradient) for gradient in gradients]
        outputs = [tf.identity(output) for output in outputs]
        return outputs, gradients[: len(inputs)], gradients[len(inputs) :]

    return step


def applied_gradients(
    replicas: BatchReplicas, model: Any, data: tuple[Any, ...]
) -> Callable[[], list[np.ndarray]]:
    """Returns a function for the gradients that a model's own training applies to its parameters.

    It runs `Model.train_step`, as in `fit`, with the compiled loss and optimizer.

    Args:
        replicas: Where the model has been built.
        model: Compiled. From now on, its optimizers put gradients in the place of weights.
        data: ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, arrays of the whole batch.

    Returns:
        A function that takes a step and returns an array ``(replicas, ...)`` for each parameter.
        It raises `ValueError` where no parameter changes.
    """
    with replicas.scope():
        keras_api.prepare_training(model, data)
        for optimizer in optimizers_of(model, model.optimizer).values():
            leave_gradients(optimizer)

    def step(data: tuple[Any, ...]) -> list[Any]:
        model.train_step(data)
        return []

    run = replicas.prepare(step, data, eager=model.run_eagerly)

    def train() -> list[np.ndarray]:
        before = replicas.values(model.trainable_variables)
        for _ in range(_STEPS):
            run()
            after = replicas.values(model.trainable_variables)
            changed = [not np.array_equal(*pair) for pair in zip(before, after, strict=True)]
            if any(changed):
                return [a if c else np.zeros_like(a) for a, c in zip(after, changed, strict=True)]
        raise ValueError(
            "`train_step` must change parameters. Received: a model whose parameters are the same "
            f"after {_STEPS} steps."
        )

    return train
