"""Makes the batch normalizations of a model synchronized ones, and plain ones again."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn import keras_api, keras_inplace
from syncbn.communicators.base import Communicator
from syncbn.keras_api import keras
from syncbn.layers import SyncBatchNormalization
from syncbn.layers.synchronized import SynchronizedLayer
from syncbn.models.statistics import all_normalizations


class Conversion(NamedTuple):
    """What became of a model. It prints as a short text."""

    model: Any
    """The model that was given, changed."""
    converted: tuple[str, ...]
    """The names of the layers that were converted."""
    unchanged: dict[str, str]
    """Why other normalizations were not, by their names."""

    def __str__(self) -> str:
        total = len(self.converted) + len(self.unchanged)
        lines = [f"{self.model.name}: {len(self.converted)} of {total} normalizations converted"]
        lines += [f"  {name}: {reason}" for name, reason in self.unchanged.items()]
        return "\n".join(lines)


def convert_sync_batchnorm(
    model: Any, *, communicator: str | Communicator = "auto", **options: Any
) -> Conversion:
    """Makes the batch normalizations of a model synchronized.

    Each `BatchNormalization` of Keras, ``synchronized=True`` or not, and each
    `SyncBatchNormalization` of tf_keras and Horovod becomes a `syncbn.SyncBatchNormalization`, in
    place: it is the same object as before, with its name, its weights, and all that refers to it.
    So this works for any kind of model, for shared, nested and wrapped layers, and a compiled model
    trains on with its optimizer as if nothing had happened. On one replica outputs and moving
    statistics are those of the layers before.

    A subclass of `BatchNormalization` is converted if all that it defines is its constructor and
    its config, else left as it is. Only layers that Keras tracks are found.

    The model forgets its train, test and predict functions. A `tf.function` of your own, and a
    compiled model around this one, must be made anew, since they hold traces of the old layers.

    Convert outside of strategy scopes, or in the one in which the model was built.

    Args:
        model: A built model or layer of `tf.keras`.
        communicator: As for `SyncBatchNormalization`.
        **options: What else `SyncBatchNormalization` takes and the plain layer does not, such as
            ``group_size``; or ``momentum``. For all layers alike. With ``momentum=None`` batches
            seen before count for nothing, and the first one replaces the moving statistics.
            ``unbiased_moving_variance`` is by default as it was: true for those layers of Keras 2
            that are fused (inputs of rank 4 or 5), false for all others.

    Returns:
        What was converted and what was not. Print it.

    Raises:
        TypeError: ``model`` is no layer, an option that is none of these.
        ValueError: the model is not built, a value that `SyncBatchNormalization` does not take.
        RuntimeError: in a graph or function, or in the scope of another strategy. Whatever is
            raised, the model is left as it was.
    """
    taken = _arguments(SyncBatchNormalization) - _arguments(keras.layers.BatchNormalization)
    taken = {name for name in taken if not name.startswith("renorm")} | {"momentum"}
    unknown = sorted(set(options) - taken)
    if unknown:
        raise TypeError(
            "Options must be arguments that SyncBatchNormalization has beside those of the plain "
            f"layer, or momentum: {', '.join(sorted(taken))}. Received: {', '.join(unknown)}."
        )
    options["communicator"] = communicator
    SyncBatchNormalization(name="any", **options)

    def why_not(layer: Any) -> str | None:
        if isinstance(layer, SynchronizedLayer):
            return f"is a {type(layer).__name__} already"
        for option in ("adjustment", "virtual_batch_size"):
            if getattr(layer, option, None) is not None:
                return f"has {option}=, as only Keras 2 knows it"
        return _differs(layer)

    def make(layer: Any) -> Any:
        # The fused kernels of Keras 2 give the moving variance Bessel's correction.
        unbiased = bool(getattr(layer, "fused", False))
        config = {**_plain_config(layer), "unbiased_moving_variance": unbiased, **options}
        return SyncBatchNormalization(**config)

    return _convert(model, why_not, make)


def revert_sync_batchnorm(model: Any) -> Conversion:
    """Makes the synchronized batch normalizations of a model plain `BatchNormalization` of Keras.

    Does the reverse of `convert_sync_batchnorm`, likewise in place; also for models that were built
    with synchronized layers: those of this package, of Keras (``synchronized=True``), of tf_keras
    and of Horovod. What a plain layer does not have (communicator, groups, virtual batches) is
    dropped.

    `SyncCentering`, and layers with ``momentum=None``, have no plain counterpart and stay.

    Under MultiWorkerMirroredStrategy this is a collective: all workers make the call.

    Args:
        model: As for `convert_sync_batchnorm`.

    Returns:
        What was converted and what was not.

    Raises:
        TypeError, ValueError, RuntimeError: as for `convert_sync_batchnorm`.
    """
    plain = keras.layers.BatchNormalization

    def why_not(layer: Any) -> str | None:
        if not isinstance(layer, keras_api.BATCH_NORMALIZATION):
            return "has no plain counterpart"
        if layer.momentum is None:
            return "has momentum=None, which a plain layer cannot have"
        if type(layer) is plain and not layer.synchronized:
            return "is plain already"
        return _differs(layer)

    return _convert(model, why_not, lambda layer: plain(**_plain_config(layer)))


def _convert(
    model: Any, why_not: Callable[[Any], str | None], make: Callable[[Any], Any]
) -> Conversion:
    """Converts those layers for which there is no reason why not to what ``make`` makes of them."""
    layers = _normalizations(model)
    made, unchanged = {}, {}
    # All that can fail comes before the first change.
    for name, layer in layers.items():
        reason = why_not(layer)
        if reason is not None:
            unchanged[name] = reason
            continue
        try:
            made[name] = _built_alike(layer, make(layer))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The layer {name} cannot be converted: {error}") from error
    ours = vars(SyncBatchNormalization(name="any")).keys()
    for name, new in made.items():
        keras_inplace.become(layers[name], new)
        for attribute in ours - vars(new).keys():
            vars(layers[name]).pop(attribute, None)
    if made:
        keras_inplace.forget_functions(model)
    return Conversion(model, tuple(made), unchanged)


def _normalizations(model: Any) -> dict[str, Any]:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a model or layer of tf.keras. Received: model={model!r}.")
    if not tf.executing_eagerly():
        raise RuntimeError(
            "A model can be converted eagerly only. Received: a call in a graph or tf.function. "
            "Convert the model before, and outside."
        )
    found = all_normalizations(model)
    unbuilt = [name for name, layer in {model.name: model, **found}.items() if not layer.built]
    if unbuilt:
        raise ValueError(
            "`model` must be built, with all of its normalizations. "
            f"Received: not built: {', '.join(unbuilt)}. Call the model on a batch first."
        )
    return found


def _differs(layer: Any) -> str | None:
    """Returns in what a layer differs from those that are known, or ``None``."""
    known = {SyncBatchNormalization, keras_api.BATCH_NORMALIZATION}
    # Looked up, never imported.
    horovod = sys.modules.get("horovod.tensorflow.sync_batch_norm")
    known.add(getattr(horovod, "SyncBatchNormalization", keras_api.BATCH_NORMALIZATION))
    own: set[str] = set()
    for cls in itertools.takewhile(lambda cls: cls not in known, type(layer).__mro__):
        members = vars(cls).items()
        own |= {k for k, v in members if inspect.isroutine(v) or isinstance(v, property)}
    own -= {"__init__", "get_config", "from_config"}
    if not own:
        return None
    return f"is a {type(layer).__name__}, with methods of its own: {', '.join(sorted(own))}"


def _plain_config(layer: Any) -> dict[str, Any]:
    """Returns the config of a layer as that of a plain one, which is not synchronized."""
    config = keras.layers.BatchNormalization.get_config(layer)
    config.pop("synchronized", None)
    if isinstance(layer, SyncBatchNormalization):
        # Where a momentum is a variable, the plain layer gets its present value.
        own = layer.get_config()
        config |= {name: own[name] for name in config if name.endswith("momentum")}
    return config


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]


def _built_alike(layer: Any, new: Any) -> Any:
    """Builds ``new`` for the inputs of ``layer``, and with its values."""
    strategy = keras_inplace.owner(layer.moving_mean)
    if tf.distribute.has_strategy() and tf.distribute.get_strategy() is not strategy:
        raise RuntimeError(
            "A model must be converted outside of strategy scopes, or in the one in which it was "
            f"built. Received: a model built in that of {strategy}, converted in that of "
            f"{tf.distribute.get_strategy()}."
        )
    with strategy.scope() if strategy else contextlib.nullcontext():
        new.build(_input_shape(layer))
        keras_inplace.copy_weights(layer, new)
    if not keras_api.KERAS_3:
        # Whether the kernels are fused is not in the config. Inference shall not differ by a bit.
        new.fused = layer.fused
    return new


def _input_shape(layer: Any) -> tuple[int | None, ...]:
    # Keras 2.16 does not remember the shape itself where `build` was called by hand.
    shape = [None] * layer.input_spec.ndim
    for axis, size in layer.input_spec.axes.items():
        shape[axis] = size
    return tuple(shape)
