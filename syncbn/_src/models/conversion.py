"""Converts the batch normalizations of a model to synchronized ones, and back."""

from __future__ import annotations

import inspect
from typing import Any

from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.keras_api import PLAIN_BATCH_NORMALIZATION
from syncbn._src.layers.sync_batch_normalization import SyncBatchNormalization
from syncbn._src.models import rebuilding
from syncbn._src.models.replacement import (
    Conversion,
    differs,
    plain_config,
    replace_layer,
    synchronize,
)

__all__ = ["Conversion", "convert_sync_batchnorm", "revert_sync_batchnorm"]


def convert_sync_batchnorm(
    model: Any, *, communicator: str | Communicator = "auto", **options: Any
) -> Conversion:
    """Converts the batch normalizations of a model to synchronized ones.

    Each `BatchNormalization` of Keras, ``synchronized=True`` or not, and each
    `SyncBatchNormalization` of tf_keras and Horovod becomes a `syncbn.SyncBatchNormalization`, in
    place: it is the same object as before, with its name and weights, and references to it stay
    valid. So this works for any kind of model, for shared, nested and wrapped layers, and a
    compiled model continues to train with its optimizer. On one replica outputs and moving
    statistics are those of the original layers.

    A subclass of `BatchNormalization` is converted only if it defines nothing but its constructor
    and its config. Layers that are not built are left unchanged. Only layers that Keras tracks are
    found. Models and layers of other classes than Keras' remember what was converted in them: their
    class becomes a subclass, of the same name, that converts it again when it is loaded or cloned.

    The model drops its train, test and predict functions. A `tf.function` of your own, and a
    compiled model that contains this one, must be created again, since they hold traces of the old
    layers.

    Convert outside of strategy scopes, or in the one in which the model was built.

    Args:
        model: A built model or layer of `tf.keras`.
        communicator: As for `SyncBatchNormalization`.
        **options: Other arguments that `SyncBatchNormalization` has and the plain layer does not,
            such as ``group_size``; or ``momentum``. The same for all layers. With ``momentum=None``
            earlier batches do not count, and the first one replaces the moving statistics.
            ``unbiased_moving_variance`` is by default as it was: true for those layers of Keras 2
            that are fused (inputs of rank 4 or 5), false for all others.

    Returns:
        What was converted and what was not. Print it.

    Raises:
        TypeError: ``model`` is not a layer, an option that is not one of these.
        ValueError: the model is not built, a value that `SyncBatchNormalization` does not take.
        RuntimeError: in a graph or function, or in the scope of another strategy. After any of
            these errors the model is unchanged.

    Example:
        >>> print(syncbn.convert_sync_batchnorm(model))
        classifier: 1 of 1 normalizations converted
    """
    taken = _arguments(SyncBatchNormalization) - _arguments(PLAIN_BATCH_NORMALIZATION)
    taken = {name for name in taken if not name.startswith("renorm")} | {"momentum"}
    unknown = sorted(set(options) - taken)
    if unknown:
        raise TypeError(
            "Options must be arguments that SyncBatchNormalization has besides those of the plain "
            f"layer, or momentum: {', '.join(sorted(taken))}. Received: {', '.join(unknown)}."
        )
    options["communicator"] = communicator
    SyncBatchNormalization(name="any", **options)

    result = synchronize(model, lambda name: options)
    if result.converted:
        rebuilding.remember(model)
    return result


def revert_sync_batchnorm(model: Any) -> Conversion:
    """Converts the synchronized batch normalizations of a model to Keras' `BatchNormalization`.

    The reverse of `convert_sync_batchnorm`, likewise in place; also for models that were built
    with synchronized layers: those of this package, of Keras (``synchronized=True``), of tf_keras
    and of Horovod. What a plain layer does not have (communicator, groups, virtual batches) is
    dropped.

    `SyncCentering`, and layers with ``momentum=None``, have no plain counterpart and stay.

    Under MultiWorkerMirroredStrategy this is a collective call: all workers make it.

    Args:
        model: As for `convert_sync_batchnorm`.

    Returns:
        What was converted and what was not.

    Raises:
        TypeError, ValueError, RuntimeError: as for `convert_sync_batchnorm`.

    Example:
        >>> conversion = syncbn.convert_sync_batchnorm(model)
        >>> print(syncbn.revert_sync_batchnorm(model))
        classifier: 1 of 1 normalizations converted
    """

    def why_not(name: str, layer: Any) -> str | None:
        if not isinstance(layer, keras_api.BATCH_NORMALIZATION):
            return "has no plain counterpart"
        if layer.momentum is None:
            return "has momentum=None, which a plain layer cannot have"
        if type(layer) is PLAIN_BATCH_NORMALIZATION and not layer.synchronized:
            return "is plain already"
        return differs(layer)

    def make(name: str, layer: Any) -> Any:
        return PLAIN_BATCH_NORMALIZATION(**plain_config(layer))

    result = replace_layer(model, why_not, make)
    rebuilding.forget(model)
    return result


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
