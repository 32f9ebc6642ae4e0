"""Changing a layer in place, in Keras 2 and 3: its class, and the variables inside its weights.

There is no public API for this. Tried with Keras 3.12, 3.14 and 3.15, and tf_keras 2.16 and 2.21;
tests/single/test_convert.py covers it.
"""

from __future__ import annotations

import inspect
from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.keras_api import keras
from syncbn._src.keras_compat.layer_names import model_and_layers

_VARIABLE = keras.Variable if keras_api.KERAS_3 else tf.Variable


def owner(weight: Any) -> Any:
    """Returns the strategy in whose scope a weight was created, or ``None``."""
    return keras_api.variable(weight)._distribute_strategy


def copy_weights(layer: Any, new: Any) -> None:
    """Prepares ``new`` to replace ``layer``; in the scope in which ``layer`` was created.

    Raises:
        ValueError: they do not have the same weights, a ``moving_count`` apart.
    """
    old, weights = _weights(layer), _weights(new)
    weights.pop("moving_count", None)  # it starts from zero
    shapes, expected = (
        {name: tuple(weight.shape) for name, weight in some.items()} for some in (weights, old)
    )
    if shapes != expected:
        raise ValueError(f"its weights must stay {expected}. Received: {shapes}.")
    for name, weight in weights.items():
        if _needs_another_variable(old[name], weight):
            weight.assign(old[name].numpy())


def become(layer: Any, new: Any) -> None:
    """Turns ``layer`` into ``new``, in place; `copy_weights` comes before.

    What every layer has is kept: name, flags, dtype policy, place in models. So are the objects
    that are its weights.
    """
    general, weights = vars(keras.layers.Layer(name=layer.name)), _weights(layer)
    for name in _methods_of_the_instance(layer):
        vars(layer).pop(name)
    layer.__class__ = type(new)
    if keras_api.KERAS_3:
        layer._tracker.unlock()
    for name, value in vars(new).items():
        if name in weights:
            if _needs_another_variable(weights[name], value):
                for inner in ("_value", "_synchronization", "_aggregation", "_dtype"):
                    setattr(weights[name], inner, getattr(value, inner))
        # The `call` of Horovod's layer has another signature.
        elif name == "_call_spec" or name not in vars(layer) or not _general(name, general):
            setattr(layer, name, value)
    if keras_api.KERAS_3:
        layer._tracker.lock()
    for name in general.keys() - vars(new).keys():
        vars(layer).pop(name, None)


def replaced_methods(layer: Any) -> list[str]:
    """Returns the names of the methods of its class that a layer object overrides."""
    return [
        name
        for name, value in _methods_of_the_instance(layer).items()
        # Keras 2 leaves such a method behind, bound to the layer, when it writes a SavedModel.
        if getattr(value, "__func__", None) is not getattr(type(layer), name)
    ]


def runs_traces(layer: Any) -> bool:
    """Says whether Keras 2 loaded a layer from a SavedModel without finding its class."""
    return type(layer).__module__.endswith(".saved_model.load")


def _methods_of_the_instance(layer: Any) -> dict[str, Any]:
    """Returns the attributes of an object that shadow methods of its class."""
    # Keras 3 wraps some methods of each layer.
    general = vars(keras.layers.Layer(name=layer.name))
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in general and inspect.isroutine(getattr(type(layer), name, None))
    }


def _general(name: str, general: Any) -> bool:
    # The prefix of TensorFlow's own attributes.
    return name in general or name.startswith("_self_")


def _weights(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, _VARIABLE)}


def _needs_another_variable(weight: Any, new: Any) -> bool:
    # It is the TensorFlow variable inside that synchronizes. In Keras 2, where there is nothing
    # around it, it is always ON_READ.
    if not keras_api.KERAS_3:
        return False
    kinds = [(one.synchronization, one.aggregation, one.dtype) for one in (weight, new)]
    return kinds[0] != kinds[1]


def forget_functions(model: Any) -> None:
    """Makes a model, and the models in it, retrace their functions."""
    for layer in model_and_layers(model).values():
        if not isinstance(layer, keras.Model):
            continue
        for name in ("train_function", "test_function", "predict_function", "train_tf_function"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
        if keras_api.KERAS_3 and layer.compiled and layer.jit_compile:
            # When it is set, Keras checks whether the layers can be compiled, and warns if not.
            layer.jit_compile = False
            layer.jit_compile = True
