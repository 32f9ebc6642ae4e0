"""What a model computes in training, by names, and how far that is from the same on one replica."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.keras_compat.layer_names import named_layers, short_name
from syncbn._src.models.equivalence import diagnosis
from syncbn._src.models.equivalence.batch_replicas import BatchReplicas
from syncbn._src.models.equivalence.differences import Row, compare, magnitude
from syncbn._src.models.equivalence.model_steps import (
    applied_gradients,
    floating,
    forward,
    forward_backward,
)


class Names(NamedTuple):
    """The names of the arrays; Keras numbers those of a second model differently."""

    inputs: list[str]
    parameters: list[str]
    statistics: list[str]

    @classmethod
    def of(cls, model: Any, x: Any) -> Names:
        """Returns the names for a model and its inputs."""
        names = _weight_names(model)
        return cls(
            [name for name, value in _named("input", x) if floating(value)],
            [names[id(weight)] for weight in model.trainable_variables],
            [names[id(weight)] for weight in _statistics(model)],
        )


class Measured(NamedTuple):
    """What a model computes in training."""

    outputs: list[np.ndarray]
    input_gradients: list[np.ndarray]
    parameter_gradients: list[np.ndarray]
    statistics: list[np.ndarray]
    """On each replica, ``(replicas, ...)``."""
    changes: list[np.ndarray]
    """The changes of the statistics."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Trains models from the same weights on the same batch, and compares.

    Args:
        names: The names of the arrays.
        weights: The weights to start from, each time.
        data: ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, arrays of the whole batch.
        loss: As for `forward_backward`.
        tolerance: The largest relative difference that is ok.
    """

    names: Names
    weights: list[np.ndarray]
    data: tuple[Any, ...]
    loss: Callable[[Any, Any], Any] | None
    tolerance: float

    def outputs(self, replicas: BatchReplicas, model: Any) -> list[np.ndarray]:
        """Returns the outputs in training."""
        self._restart(replicas, model)
        return replicas.concatenate(replicas.prepare(forward(model), {"x": self.data[0]})())

    def measure(
        self, replicas: BatchReplicas, model: Any, projections: Sequence[np.ndarray]
    ) -> Measured:
        """Returns what the model computes."""
        self._restart(replicas, model)
        data = {"x": self.data[0], "projections": projections}
        if len(self.data) > 1:
            data["y"] = self.data[1]
        before = replicas.values(_statistics(model))
        step = forward_backward(model, self.loss, len(projections[0]))
        outputs, inputs, parameters = zip(*replicas.prepare(step, data)(), strict=True)
        after = replicas.values(_statistics(model))
        return Measured(
            replicas.concatenate(outputs),
            replicas.concatenate(inputs),
            replicas.add(parameters),
            after,
            [new - old for new, old in zip(after, before, strict=True)],
        )

    def train(self, replicas: BatchReplicas, model: Any, steps: int) -> list[list[np.ndarray]]:
        """Returns the gradients of `train_step`, ``(replicas, ...)`` each, of some equal steps.

        Raises:
            ValueError: a step does not change any parameter.
        """
        train = applied_gradients(replicas, model, self.data)
        results = []
        for _ in range(steps):
            self._restart(replicas, model)
            results.append(train())
        return results

    def output_rows(
        self, quantity: str, actual: list[np.ndarray], expected: list[np.ndarray]
    ) -> list[Row]:
        """Returns how far outputs are off, each relative to its own magnitude."""
        names = [f"output {number}" for number in range(len(expected))]
        sizes = [magnitude(output) for output in expected]
        return compare(quantity, names, actual, expected, self.tolerance, sizes)

    def gradient_rows(
        self, quantity: str, actual: list[np.ndarray], expected: list[np.ndarray]
    ) -> list[Row]:
        """Returns how far gradients are off, relative to the magnitude of all.

        Not to its own: that of a bias before a normalization is zero, up to rounding.
        """
        inputs = quantity == diagnosis.INPUT_GRADIENTS
        names = self.names.inputs if inputs else self.names.parameters
        sizes = [max(map(magnitude, expected), default=0.0)] * len(expected)
        return compare(quantity, names, actual, expected, self.tolerance, sizes)

    def rows(self, actual: Measured, expected: Measured) -> list[Row]:
        """Returns how far everything is off."""
        return [
            *self.output_rows(diagnosis.OUTPUTS, actual.outputs, expected.outputs),
            *self.gradient_rows(
                diagnosis.INPUT_GRADIENTS, actual.input_gradients, expected.input_gradients
            ),
            *self.gradient_rows(
                diagnosis.PARAMETER_GRADIENTS,
                actual.parameter_gradients,
                expected.parameter_gradients,
            ),
            *self._statistic_rows(actual, expected),
        ]

    def _statistic_rows(self, actual: Measured, expected: Measured) -> list[Row]:
        # A change has the rounding error of the values, and a mean that is zero, up to rounding,
        # changes little.
        floor = 0.01 * max(map(magnitude, expected.statistics), default=0.0)
        # Statistics that do not move at all, such as frozen ones, are left out.
        moving = [
            (name, there, here[0])
            for name, there, here in zip(
                self.names.statistics, actual.changes, expected.changes, strict=True
            )
            if there.any() or here.any()
        ]
        if not moving:
            return []
        names, there, here = zip(*moving, strict=True)
        sizes = [magnitude(change) + floor for change in here]
        return compare(diagnosis.STATISTICS, names, there, here, self.tolerance, sizes)

    def _restart(self, replicas: BatchReplicas, model: Any) -> None:
        with replicas.scope():
            model.set_weights(self.weights)


def random_projections(outputs: list[np.ndarray], samples: int) -> list[np.ndarray]:
    """Returns factors for the outputs; the sum of the products is a loss.

    Each sample has its own: in a plain sum, what normalizations do would cancel.

    Raises:
        ValueError: no outputs, or no batch of them.
    """
    shapes = [output.shape for output in outputs]
    if not shapes or any(shape[:1] != (samples,) for shape in shapes):
        raise ValueError(
            "The model must have floating outputs, whose first axis is that of the batch. "
            f"Received: outputs of shape {', '.join(map(str, shapes)) or 'none'} for {samples} "
            "samples."
        )
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def _statistics(model: Any) -> list[Any]:
    return [w for w in model.non_trainable_weights if tf.as_dtype(w.dtype).is_floating]


def _weight_names(model: Any) -> dict[int, str]:
    """Returns names for the weights, by `id`: that of the innermost layer, and their own."""
    owners = {id(weight): (weight, "") for weight in model.weights}
    for path, layer in named_layers(model).items():
        owners.update({id(weight): (weight, f"{path}/") for weight in layer.weights})
    names: dict[int, str] = {}
    for key, (weight, prefix) in owners.items():
        name = prefix + short_name(weight)
        taken = sum(other.partition(" #")[0] == name for other in names.values())
        names[key] = f"{name} #{taken + 1}" if taken else name
    return names


def _named(name: str, structure: Any) -> list[tuple[str, Any]]:
    """Returns the leaves in the order of `tf.nest.flatten`, with names."""
    if isinstance(structure, dict):
        items = sorted(structure.items())
    elif isinstance(structure, (list, tuple)):
        items = list(enumerate(structure))
    else:
        return [(name, structure)]
    return [leaf for key, value in items for leaf in _named(f"{name}/{key}", value)]
