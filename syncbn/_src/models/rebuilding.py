"""Models that rebuild their layers in their own code remember what was converted in them.

A functional model of Keras has its layers in its config, and so what they were converted to. A
model or layer of another class creates its layers in its own code: plain ones. Its class becomes a
subclass whose config also has what was converted, and which converts that again.
"""

from __future__ import annotations

import warnings
from typing import Any

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.disguised_classes import disguised_class
from syncbn._src.keras_compat.keras_api import keras
from syncbn._src.keras_compat.layer_names import model_and_layers
from syncbn._src.layers.sync_batch_normalization import SyncBatchNormalization
from syncbn._src.models.replacement import input_shape, plain_config, synchronize
from syncbn._src.models.statistics import all_normalizations

_KEY = "converted_by_syncbn"


def remember(model: Any) -> None:
    """Makes a model, and the layers in it, remember what was converted."""
    for layer in model_and_layers(model).values():
        if isinstance(layer, (_Converted, keras_api.BATCH_NORMALIZATION)):
            continue
        # Keras' own classes have their layers in their config.
        own = not type(layer).__module__.startswith(("keras.", "tf_keras."))
        if own and _has_synchronized(layer):
            layer.__class__ = _converted_class(type(layer))


def forget(model: Any) -> None:
    """Restores the classes of a model, and of the layers in it, where nothing is converted."""
    for layer in model_and_layers(model).values():
        if isinstance(layer, _Converted) and not _has_synchronized(layer):
            layer.__class__ = layer._plain_class


def _has_synchronized(layer: Any) -> bool:
    return any(_options(inner) is not None for inner in all_normalizations(layer).values())


def _options(layer: Any) -> dict[str, Any] | None:
    """Returns the config of a synchronized layer without that of a plain one."""
    if not isinstance(layer, SyncBatchNormalization):
        return None
    known = plain_config(layer).keys() - {"momentum"}
    return {name: value for name, value in layer.get_config().items() if name not in known}


@keras_api.register_keras_serializable(package="syncbn", name="Converted")
class _Converted:
    """Mixin for the class of a model in which layers were converted."""

    _plain_class: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A user's own is for the user's subclasses, and this is not one of them.
        pass

    def get_config(self) -> dict[str, Any]:
        converted, plain = type(self), self._plain_class
        # As in Keras, which cannot import what a script defines.
        module = None if plain.__module__ == "__main__" else plain.__module__
        # Keras inspects the class, to see whether it overrides `get_config`.
        self.__class__ = plain
        try:
            config, build_config = self.get_config(), self.get_build_config()
        finally:
            self.__class__ = converted
        return {
            _KEY: {
                "module": module,
                "class_name": plain.__name__,
                "registered_name": keras.utils.get_registered_name(plain),
                "config": config,
                "build_config": build_config,
                "options": [_options(layer) for layer in all_normalizations(self).values()],
                "shapes": [
                    input_shape(layer) if layer.built else None
                    for layer in all_normalizations(self).values()
                ],
            }
        }

    def get_build_config(self) -> Any:
        # That of the plain class is in the config.
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        if _KEY not in config:
            return cls._plain_class.from_config(config)  # type: ignore[attr-defined]
        try:
            plain = dict(config[_KEY])
            options, shapes = plain.pop("options"), plain.pop("shapes")
            layer = _rebuilt(plain, cls._plain_class)
            _convert_again(layer, options, shapes)
        except Exception as error:
            if not keras_api.KERAS_3:
                # Its loader of SavedModels catches all errors.
                warnings.warn(f"A converted model was not restored: {error}", stacklevel=2)
            raise
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by their names, and this one has that of the plain class.
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if getattr(make, "__self__", None) is type(self):
            return getattr(self._plain_class, make.__name__), arguments, *rest
        if arguments and arguments[0] is type(self):
            return _blank, (self._plain_class, *arguments[1:]), *rest
        return make, arguments, *rest


def _blank(plain: type, *arguments: Any) -> Any:
    cls = _converted_class(plain)
    return cls.__new__(cls, *arguments)


def _rebuilt(plain: dict[str, Any], known: type) -> Any:
    """Creates a layer as Keras would, from the config of a plain class.

    ``known`` is a class that may be meant, and need not be registered.
    """
    cls = keras.utils.get_registered_object(plain["registered_name"])
    names = known.__name__, keras.utils.get_registered_name(known)
    if cls is None and names == (plain["class_name"], plain["registered_name"]):
        cls = known
    if cls is None:
        return keras.utils.deserialize_keras_object(plain)
    # Keras 2 has two formats for this, and not all of its loaders know both.
    layer = cls.from_config(plain["config"])
    # A layer without a `build` of its own is built by its first call; a model by one of Keras.
    builds = issubclass(cls, keras.Model) or cls.build is not keras.layers.Layer.build
    if plain["build_config"] and builds and not layer.built:
        layer.build_from_config(plain["build_config"])
        layer.built = True  # as Keras itself does
    return layer


def _convert_again(layer: Any, options: list[dict[str, Any] | None], shapes: list[Any]) -> None:
    found = all_normalizations(layer)
    if len(found) != len(options):
        raise ValueError(
            f"{type(layer).__name__} must make {len(options)} normalizations when it is built from "
            f"its config. Received: {len(found)}. Build the model yourself, convert it with "
            "syncbn.convert_sync_batchnorm, and load its weights (save_weights, load_weights)."
        )
    for one, shape in zip(found.values(), shapes, strict=True):
        # A layer without a `build` of its own builds those in it when it is called.
        if shape is not None and not one.built:
            one.build(tuple(shape))
    if any(one.built for one in found.values()):
        known = dict(zip(found, options, strict=True))
        synchronize(layer, lambda name, _: known[name], "was not converted before")
        remember(layer)


def _converted_class(cls: type) -> Any:
    return disguised_class(_Converted, cls, "Converted")
