"""What is probably wrong with a model that computes something else on several replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import named_layers
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.models.equivalence.differences import Row, common_factor

OUTPUTS = "outputs"
INPUT_GRADIENTS = "input gradients"
PARAMETER_GRADIENTS = "parameter gradients"
STATISTICS = "moving statistics"
TRAINING = "gradients of train_step"
REPEATED = "outputs, twice on one replica"
REPEATED_TRAINING = "train_step, twice on one replica"

_ROUNDING = (
    "Or, where differences are small, it is rounding, which deep networks amplify: see whether "
    "they vanish in float64, after tf.keras.backend.set_floatx('float64')."
)
_LISTED = 5
"""The most names that advice lists."""
_PLAIN = keras_api.PLAIN_BATCH_NORMALIZATION  # not tf_keras' SyncBatchNormalization


def diagnose(
    rows: list[Row], model: Any, replicas: int, communicator: Communicator | None
) -> list[str]:
    """Returns what is probably wrong, judging from the rows.

    Args:
        rows: Those of all quantities.
        model: The one on several replicas.
        replicas: The number of replicas.
        communicator: Their communicator, where they are workers.
    """
    if all(row.ok for row in rows):
        return []
    if broken := _not_finite(rows):
        return [f"Not finite: {_listed(broken)}."]
    if not all(row.ok for row in rows if row.quantity in (OUTPUTS, STATISTICS)):
        return unsynchronized(model)
    backward = [r for r in rows if r.quantity in (INPUT_GRADIENTS, PARAMETER_GRADIENTS)]
    found = _of_loss(backward, replicas)
    known = {row.name for row in backward if not row.ok}
    training = [r for r in rows if r.quantity == TRAINING and r.name not in known]
    return found + _of_training(training, replicas, communicator)


def _of_loss(rows: list[Row], replicas: int) -> list[str]:
    if all(row.ok for row in rows):
        return []
    factor = common_factor(rows)
    if factor is not None:
        return [f"All gradients of `loss` are {_scaling(factor, replicas)}"]
    return _own_reduction(rows, replicas) or [
        "Outputs are right, gradients are not: a layer's gradient sums over its own replica where "
        "it should sum over all, or the other way round. " + _ROUNDING
    ]


def _of_training(rows: list[Row], replicas: int, communicator: Communicator | None) -> list[str]:
    if all(row.ok for row in rows):
        return []
    factor = common_factor(rows)
    if factor is not None:
        return [f"All gradients of train_step are {_scaling(factor, replicas)}"]
    if communicator is not None:
        return [
            "train_step does not apply the mean gradient of all workers: see "
            "syncbn.training.distribute(optimizer)."
        ]
    return [
        "The gradients of train_step are not those of the whole batch, while the model's are: its "
        "loss is not a mean or sum over samples, or the gradients of each replica are changed "
        "(clipped, say) before they are summed. " + _ROUNDING
    ]


def _scaling(factor: float, replicas: int) -> str:
    text = f"{factor:.3g} times those of one replica: "
    if np.isclose(factor, replicas, rtol=0.05):
        return (
            text + "the loss is not divided by the number of replicas, whose gradients are summed. "
            "Divide its sum over samples by the size of the whole batch."
        )
    if np.isclose(factor, 1 / replicas, rtol=0.05):
        return (
            text + "the loss is divided by the number of replicas twice, or gradients are averaged "
            "over replicas after the loss was divided."
        )
    return text + "the loss is scaled differently on several replicas than on one."


def _own_reduction(rows: list[Row], replicas: int) -> list[str]:
    """Returns advice for those parameters whose gradients are off by a factor."""
    double = [r.name for r in rows if r.factor and np.isclose(r.factor, replicas, rtol=0.05)]
    means = [r.name for r in rows if r.factor and np.isclose(r.factor, 1 / replicas, rtol=0.05)]
    found = []
    if double:
        found.append(
            f"Double reduction: the gradients of {_listed(double)} are {replicas} times too large. "
            "They are summed over the replicas in the model, and again by the training loop. A "
            "layer must return the gradient of its own replica."
        )
    if means:
        found.append(
            f"The gradients of {_listed(means)} are {replicas} times too small: the model averages "
            "them over the replicas. A layer must return the gradient of its own replica."
        )
    return found


def unsynchronized(model: Any) -> list[str]:
    """Returns advice where a model computes something else on several replicas."""
    found = []
    plain = [
        name
        for name, layer in of_kind(model, _PLAIN).items()
        if layer.trainable
        and not isinstance(layer, SynchronizedLayer)
        and not getattr(layer, "synchronized", False)
    ]
    if plain:
        found.append(
            f"Not synchronized: {_listed(plain)}. A plain BatchNormalization takes the statistics "
            "of its own replica. Use syncbn.convert_sync_batchnorm(model), or "
            "syncbn.SyncBatchNormalization in its place."
        )
    ours = of_kind(model, SynchronizedLayer)
    local = [name for name, layer in ours.items() if layer.get_config()["communicator"] == "local"]
    if local:
        found.append(f"Not synchronized: {_listed(local)}, by communicator='local'.")
    options = ("group_size", "groups", "target_batch", "virtual_batch_size")
    partly = [
        name
        for name, layer in ours.items()
        if any(layer.get_config().get(option) for option in options)
    ]
    if partly:
        found.append(
            f"Synchronized within groups or virtual batches only, as asked for: {_listed(partly)}. "
            "They are compared with the whole batch."
        )
    return found or [
        "A layer uses a quantity of its own replica where it needs that of the whole batch, such "
        "as a mean over samples. " + _ROUNDING
    ]


def randomness(rows: list[Row], model: Any, what: str) -> str:
    """Returns advice where ``what`` differs between two calls, as the rows show."""
    if broken := _not_finite(rows):
        return f"Not finite, even on one replica: {_listed(broken)}."
    layers = named_layers(model)
    suspects = [
        f"{n} ({type(v).__name__})" for n, v in layers.items() if keras_api.draws_numbers(v)
    ]
    named = f"Random layers: {_listed(suspects)}. " if suspects else ""
    return (
        f"Nothing can be compared, since {what} gives different results at each call, even on one "
        f"replica. {named}Build the model without randomness for this check (dropout with rate 0)."
    )


def _not_finite(rows: list[Row]) -> list[str]:
    return [row.name for row in rows if not np.isfinite(row.difference)]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def of_kind(model: Any, kind: Any) -> dict[str, Any]:
    """Returns the layers of a kind, by their names."""
    return {n: v for n, v in named_layers(model).items() if isinstance(v, kind)}
