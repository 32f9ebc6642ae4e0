"""Changing a layer in place, in either Keras: its class, and what its weights are made of.

There is no public way. Tried with Keras 3.12, 3.14 and 3.15, and tf_keras 2.16 and 2.21;
tests/single/test_convert.py holds it.
"""

from __future__ import annotations

import inspect
from typing import Any

import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.keras_api import keras
from syncbn._src.keras_compat.layer_names import named_layers

_VARIABLE = keras.Variable if keras_api.KERAS_3 else tf.Variable


def owner(weight: Any) -> Any:
    """Returns the strategy in whose scope a weight was made, or ``None``."""
    return keras_api.variable(weight)._distribute_strategy


def copy_weights(layer: Any, new: Any) -> None:
    """Prepares ``new`` to replace ``layer``; in the scope in which ``layer`` was made.

    Raises:
        ValueError: they have not the same weights, but for a ``moving_count``.
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
    """Makes ``layer`` all that ``new`` is, in place; `copy_weights` comes before.

    What every layer has stays as it is: name, flags, policy, place in models. So do the objects
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
        # Horovod's layer has a call of another signature.
        elif name == "_call_spec" or name not in vars(layer) or not _general(name, general):
            setattr(layer, name, value)
    if keras_api.KERAS_3:
        layer._tracker.lock()
    for name in general.keys() - vars(new).keys():
        vars(layer).pop(name, None)


def replaced_methods(layer: Any) -> list[str]:
    """Returns the names of those methods of a layer's class that are not what the layer calls."""
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
    """Returns what an object has of its own in place of its class's methods."""
    # Keras 3 wraps these of each layer.
    general = vars(keras.layers.Layer(name=layer.name))
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in general and inspect.isroutine(getattr(type(layer), name, None))
    }


def _general(name: str, general: Any) -> bool:
    # TensorFlow's own begin so.
    return name in general or name.startswith("_self_")


def _weights(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, _VARIABLE)}


def _needs_another_variable(weight: Any, new: Any) -> bool:
    # The way to synchronize is that of the variable of TensorFlow inside. Those of Keras 2, which
    # has nothing around them, are all ON_READ.
    if not keras_api.KERAS_3:
        return False
    kinds = [(one.synchronization, one.aggregation, one.dtype) for one in (weight, new)]
    return kinds[0] != kinds[1]


def forget_functions(model: Any) -> None:
    """Makes a model, and the models in it, trace their functions anew."""
    for layer in (model, *named_layers(model).values()):
        if not isinstance(layer, keras.Model):
            continue
        for name in ("train_function", "test_function", "predict_function", "train_tf_function"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
        if keras_api.KERAS_3 and layer.compiled and layer.jit_compile:
            # When it is set anew, Keras looks whether its layers can be compiled, or else warns.
            layer.jit_compile = False
            layer.jit_compile = True
