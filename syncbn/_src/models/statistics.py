"""Reading and setting the moving statistics of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import require_agreement
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import model_and_layers
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.models import in_place


class MovingStatistics(NamedTuple):
    """The moving statistics of a layer, each an array ``(channels,)``.

    ``None`` stands for what the layer does not have; where statistics are set, also for what is to
    be left unchanged.

    Example:
        >>> mean, variance, count = syncbn.moving_statistics(model)["normalization"]
        >>> mean.shape, count
        ((4,), None)
    """

    mean: Any = None
    """The moving mean."""
    variance: Any = None
    """Of a batch normalization; `SyncCentering` has none."""
    count: Any = None  # (also a method of tuples, of another type)
    """The number of elements seen, where ``momentum=None`` (the cumulative average)."""


_WEIGHTS = ("moving_mean", "moving_variance", "moving_count")


def moving_statistics(model: Any) -> dict[str, MovingStatistics]:
    """Returns the moving statistics of each normalization in a model, by its name.

    These are the layers of this package and the `BatchNormalization` of Keras, as far as they are
    built. A name is prefixed with those of the enclosing layers: ``"block/normalization"``. A layer
    that is used twice appears once.

    Under MultiWorkerMirroredStrategy reading them is a collective call: all workers make it. With
    several replicas in a strategy this is the mean of the per-replica copies, which are equal.
    TensorFlow rounds it: it equals each copy with 2 or 4 replicas, and is off by an ulp or two with
    others.

    Args:
        model: A model or layer of `tf.keras`.

    Example:
        >>> statistics = syncbn.moving_statistics(model)
        >>> list(statistics)
        ['normalization']
        >>> print(statistics["normalization"].mean)
        [0. 0. 0. 0.]
    """
    return {
        name: MovingStatistics(*map(_values(layer).get, _WEIGHTS))
        for name, layer in normalizations(model).items()
    }


def set_moving_statistics(
    model: Any, statistics: Mapping[str, MovingStatistics | tuple[Any, ...]]
) -> None:
    """Sets the moving statistics of some or all normalizations in a model.

    In a job of several workers all of them have to set the same values.

    Args:
        model: As for `moving_statistics`.
        statistics: New values by the names that `moving_statistics` gives: means, variances and
            counts. ``None``, and what is left out, is left unchanged.

    Raises:
        ValueError: a name or value for something that the model does not have, a value of another
            shape, one that is not finite, a negative variance or count. The model is then
            unchanged.

    Example:
        >>> ones = syncbn.MovingStatistics(mean=np.ones(4), variance=None, count=None)
        >>> syncbn.set_moving_statistics(model, {"normalization": ones})
    """
    layers = normalizations(model)
    unknown = sorted(set(statistics) - set(layers))
    if unknown:
        raise ValueError(
            f"`statistics` must be for normalizations of the model: {', '.join(layers) or 'none'}. "
            f"Received: {', '.join(unknown)}."
        )
    changes = []
    for name, given in statistics.items():
        values = _values(layers[name])
        for weight, value in zip(_WEIGHTS, given, strict=False):
            if value is not None:
                values[weight] = _checked(f"{weight} of {name}", value, values.get(weight))
        changes.append((layers[name], values))
    for layer, values in changes:
        if "moving_stddev" in values:
            # Batch renormalization averages deviations, and computes the variance from them.
            variance = values["moving_variance"].astype(np.float64)
            values["moving_stddev"] = np.sqrt(variance + layer.epsilon)
        layer.set_weights(list(values.values()))


def normalizations(model: Any) -> dict[str, Any]:
    """Returns the normalizations of a model that are built, by their names."""
    return {name: layer for name, layer in all_normalizations(model).items() if layer.built}


def all_normalizations(model: Any) -> dict[str, Any]:
    """Returns the normalizations of a model by their names; itself, if it is one."""
    kinds = (SynchronizedLayer, keras_api.BATCH_NORMALIZATION)
    layers = model_and_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, kinds)}


def channels_of(layer: Any) -> int:
    """Returns the number of channels of a normalization that is built."""
    return math.prod(layer.moving_mean.shape)


def require_same_normalizations(workers: Communicator, layers: Mapping[str, Any]) -> None:
    """Raises a ValueError where workers have other normalizations than others."""
    kinds = [f"{name} {layer.moving_mean.shape}" for name, layer in layers.items()]
    require_agreement(workers, kinds, list(layers), "normalizations")


def uncalled(model: Any) -> dict[str, str]:
    """Returns why normalizations of a model are never called, by their names.

    Keras 2 loads a layer whose class it does not find from the traces that were saved with it.
    """
    layers = model_and_layers(model)
    traced = {name: layer for name, layer in layers.items() if in_place.runs_traces(layer)}
    return {
        inner: f"is never called: {name} was loaded from a SavedModel without its class, and runs "
        "what was traced then. Load it with its class: register that "
        "(tf.keras.utils.register_keras_serializable), or give load_model(custom_objects=...)"
        for name, layer in traced.items()
        for inner in all_normalizations(model)
        if inner.startswith(f"{name}/") or layer is model
    }


def _values(layer: Any) -> dict[Any, np.ndarray]:
    """Returns the values of all weights, in the order of the layer; statistics by their names."""
    names = {id(getattr(layer, name, None)): name for name in (*_WEIGHTS, "moving_stddev")}
    # By the layer's own methods, which also work in a session.
    pairs = zip(layer.weights, layer.get_weights(), strict=True)
    return {names.get(id(weight), id(weight)): value for weight, value in pairs}


def _checked(what: str, value: Any, old: np.ndarray | None) -> np.ndarray:
    """Returns a new value in the dtype of the old one."""
    new = np.asarray(value, np.float64)
    if old is None:
        raise ValueError(f"{what} cannot be set, as the layer has none. Received: {value!r}.")
    if new.shape != old.shape:
        raise ValueError(f"{what} must have shape {old.shape}. Received: shape {new.shape}.")
    if not np.isfinite(new).all():
        raise ValueError(f"{what} must be finite. Received: {value!r}.")
    if not what.startswith("moving_mean") and (new < 0).any():
        raise ValueError(f"{what} must not be negative. Received: {value!r}.")
    return new.astype(old.dtype)
