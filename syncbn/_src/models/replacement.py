"""Replaces the normalizations of a model by others, in place."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.keras_api import PLAIN_BATCH_NORMALIZATION, keras
from syncbn._src.layers.sync_batch_normalization import SyncBatchNormalization
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.models import in_place
from syncbn._src.models.statistics import all_normalizations, uncalled


class Conversion(NamedTuple):
    """The result of a conversion. It prints as a short text.

    Example:
        >>> conversion = syncbn.convert_sync_batchnorm(model, return_conversion=True)
        >>> conversion.converted, conversion.unchanged
        (('normalization',), {})
    """

    model: Any
    """The model that was given, changed."""
    converted: tuple[str, ...]
    """The names of the layers that were converted."""
    unchanged: dict[str, str]
    """Why other normalizations were not converted, by their names."""

    def __str__(self) -> str:
        total = len(self.converted) + len(self.unchanged)
        lines = [f"{self.model.name}: {len(self.converted)} of {total} normalizations converted"]
        lines += [f"  {name}: {reason}" for name, reason in self.unchanged.items()]
        return "\n".join(lines)


def synchronize(
    model: Any, options_of: Callable[[str, Any], dict[str, Any] | None], otherwise: str
) -> Conversion:
    """Converts normalizations to synchronized ones.

    Args:
        model: The model, or layer.
        options_of: Returns arguments of `SyncBatchNormalization` for a name and layer; ``None`` to
            leave it.
        otherwise: Why it is left then.
    """

    def why_not(name: str, layer: Any) -> str | None:
        if options_of(name, layer) is None:
            return otherwise
        if isinstance(layer, SynchronizedLayer):
            return f"is a {type(layer).__name__} already"
        for option in ("adjustment", "virtual_batch_size"):
            if getattr(layer, option, None) is not None:
                return f"has {option}=, as only Keras 2 knows it"
        return differs(layer)

    def make(name: str, layer: Any) -> Any:
        # The fused kernels of Keras 2 apply Bessel's correction to the moving variance.
        unbiased = bool(getattr(layer, "fused", False))
        config = {**plain_config(layer), "unbiased_moving_variance": unbiased}
        return SyncBatchNormalization(**config | (options_of(name, layer) or {}))

    return replace_layer(model, why_not, make)


def replace_layer(
    model: Any,
    why_not: Callable[[str, Any], str | None],
    make: Callable[[str, Any], Any],
) -> Conversion:
    """Replaces each layer for which ``why_not`` gives no reason by what ``make`` returns."""
    layers = convertible(model)
    traced = uncalled(model)
    made, unchanged = {}, {}
    # All that can fail comes before the first change.
    for name, layer in layers.items():
        reason = traced.get(name) or why_not(name, layer)
        if reason is None and not layer.built:
            reason = "is not built, since it was never called. If it ever is, convert again"
        if reason is not None:
            unchanged[name] = reason
            continue
        try:
            made[name] = _built_alike(layer, make(name, layer))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The layer {name} cannot be converted: {error}") from error
    ours = vars(SyncBatchNormalization(name="any")).keys()
    for name, new in made.items():
        in_place.become(layers[name], new)
        for attribute in ours - vars(new).keys():
            vars(layers[name]).pop(attribute, None)
    if made:
        in_place.forget_functions(model)
    return Conversion(model, tuple(made), unchanged)


def convertible(model: Any) -> dict[str, Any]:
    """Returns the normalizations of a model by their names.

    Raises:
        TypeError, ValueError, RuntimeError: nothing in it can be converted, or not here.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a model or layer of tf.keras. Received: model={model!r}.")
    if not tf.executing_eagerly():
        raise RuntimeError(
            "A model can be converted eagerly only. Received: a call in a graph or tf.function. "
            "Convert the model before, and outside."
        )
    found = all_normalizations(model)
    unbuilt = [name for name, layer in {model.name: model, **found}.items() if not layer.built]
    # One that is never called does not prevent the conversion of the others.
    if set(found) <= set(unbuilt) and (found or not model.built):
        raise ValueError(
            "`model` must be built, with its normalizations. "
            f"Received: not built: {', '.join(unbuilt)}. Call the model on a batch first."
        )
    return found


def differs(layer: Any) -> str | None:
    """Returns how a layer differs from the known classes, or ``None``."""
    known = {SyncBatchNormalization, PLAIN_BATCH_NORMALIZATION, keras_api.BATCH_NORMALIZATION}
    # Looked up, never imported.
    horovod = sys.modules.get("horovod.tensorflow.sync_batch_norm")
    known.add(getattr(horovod, "SyncBatchNormalization", keras_api.BATCH_NORMALIZATION))
    own = set(in_place.replaced_methods(layer))
    for cls in itertools.takewhile(lambda cls: cls not in known, type(layer).__mro__):
        members = vars(cls).items()
        own |= {k for k, v in members if inspect.isroutine(v) or isinstance(v, property)}
    own -= {"__init__", "get_config", "from_config"}
    if not own:
        return None
    return f"is a {type(layer).__name__}, with methods of its own: {', '.join(sorted(own))}"


def plain_config(layer: Any) -> dict[str, Any]:
    """Returns the config of a layer as that of a plain one, which is not synchronized."""
    config = PLAIN_BATCH_NORMALIZATION.get_config(layer)
    config.pop("synchronized", None)
    if isinstance(layer, SyncBatchNormalization):
        # Where a momentum is a variable, the plain layer gets its current value.
        own = layer.get_config()
        config |= {name: own[name] for name in config if name.endswith("momentum")}
    return config


def _built_alike(layer: Any, new: Any) -> Any:
    """Builds ``new`` for the input shape of ``layer``, and with its weights' values."""
    strategy = in_place.owner(layer.moving_mean)
    if tf.distribute.has_strategy() and tf.distribute.get_strategy() is not strategy:
        raise RuntimeError(
            "A model must be converted outside of strategy scopes, or in the one in which it was "
            f"built. Received: a model built in that of {strategy}, converted in that of "
            f"{tf.distribute.get_strategy()}."
        )
    with strategy.scope() if strategy else contextlib.nullcontext():
        new.build(input_shape(layer))
        in_place.copy_weights(layer, new)
    if not keras_api.KERAS_3:
        # Whether the kernels are fused is not in the config. Inference must stay bitwise the same.
        new.fused = layer.fused
    return new


def input_shape(layer: Any) -> tuple[int | None, ...]:
    """Returns the input shape that a normalization was built for, as far as it is required."""
    # Keras 2.16 does not remember the shape itself where `build` was called by hand.
    shape = [None] * layer.input_spec.ndim
    for axis, size in layer.input_spec.axes.items():
        shape[axis] = size
    return tuple(shape)
