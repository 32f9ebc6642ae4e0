"""Names of layers and weights that are the same on all workers."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from syncbn._src.keras_compat.keras_api import KERAS_3


def named_layers(model: Any) -> dict[str, Any]:
    """Returns the layers of ``model``, each once, by names such as ``"block/normalization"``.

    They are in tracking order, with nested layers after the layer that contains them.
    """
    found: dict[str, Any] = {}
    seen = {id(model)}

    def walk(outer: Any, prefix: str) -> None:
        # A private method of Keras 2 and 3; `Model.layers` leaves out nested layers.
        for layer in outer._flatten_layers(recursive=False, include_self=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            name = _unused(prefix + layer.name, found)
            found[name] = layer
            walk(layer, f"{name}/")

    walk(model, "")
    return found


def model_and_layers(model: Any) -> dict[str, Any]:
    """Returns ``model`` and its layers, by the names that `named_layers` gives to these."""
    layers = named_layers(model)
    return {_unused(model.name, layers): model, **layers}


def _unused(name: str, taken: Container[str]) -> str:
    unused, number = name, 1
    while unused in taken:
        unused, number = f"{name}_{number}", number + 1
    return unused


def full_name(weight: Any) -> str:
    """Returns the name of a weight within its model, which in Keras 2 has that of its layer."""
    return getattr(weight, "path", weight.name)


def short_name(weight: Any) -> str:
    """Returns the name of a weight within its layer, such as ``"moving_mean"``."""
    return weight.name if KERAS_3 else weight.name.rpartition("/")[2].partition(":")[0]


def collective_scope(layer: Any) -> str:
    """Returns the first part of the names of a layer's collectives.

    Not Keras 3's path, which in a loaded `Sequential` is another one than in that which was saved.
    """
    return "syncbn/" + re.sub(r"[^\w.\-/]", "_", layer.name, flags=re.ASCII)
