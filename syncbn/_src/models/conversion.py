"""Converts the batch normalizations of a model to synchronized ones, and back."""

from __future__ import annotations

import fnmatch
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

from syncbn._src.communicators.base import Communicator
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.keras_api import PLAIN_BATCH_NORMALIZATION
from syncbn._src.layers.sync_batch_normalization import SyncBatchNormalization
from syncbn._src.models import rebuilding
from syncbn._src.models.replacement import (
    Conversion,
    convertible,
    differs,
    plain_config,
    replace_layer,
    synchronize,
)
from syncbn._src.models.synchronization_advice import Advice

_log = logging.getLogger("syncbn")
_NOT_CHOSEN = "is not one of those to convert"
_PLAIN_ALREADY = "is plain already"
_GROUPING = {"group_size", "groups", "target_batch"}

Only = (
    str
    | Iterable[str]
    | Mapping[str, Mapping[str, Any]]
    | Callable[[str, Any], bool]
    | Advice
    | None
)
"""A choice of layers."""


@overload
def convert_sync_batchnorm(
    model: Any,
    *,
    only: Only = ...,
    communicator: str | Communicator = ...,
    return_conversion: Literal[True],
    **options: Any,
) -> Conversion: ...


@overload
def convert_sync_batchnorm(
    model: Any,
    *,
    only: Only = ...,
    communicator: str | Communicator = ...,
    return_conversion: Literal[False] = ...,
    **options: Any,
) -> Any: ...


def convert_sync_batchnorm(
    model: Any,
    *,
    only: Only = None,
    communicator: str | Communicator = "auto",
    return_conversion: bool = False,
    **options: Any,
) -> Any:
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
        only: Which layers to convert; the others stay as they are. Names or patterns of
            `fnmatch` (``"backbone/*"``; ``*`` also matches slashes), one or several; a function of
            the name and the layer; the `Advice` of `syncbn.advise`, with its size of groups; or a
            mapping from names to options for that layer. Names are those of
            `syncbn.moving_statistics`.
        communicator: As for `SyncBatchNormalization`.
        return_conversion: Whether to return the model (as torch's ``convert_sync_batchnorm`` does)
            or what was done.
        **options: Other arguments that `SyncBatchNormalization` has and the plain layer does not,
            such as ``group_size``; or ``momentum``. The same for all layers. With ``momentum=None``
            earlier batches do not count, and the first one replaces the moving statistics.
            ``unbiased_moving_variance`` is by default as it was: true for those layers of Keras 2
            that are fused (inputs of rank 4 or 5), false for all others.

    Returns:
        ``model``, the same object. With ``return_conversion`` a `Conversion`: what was converted,
        and why the others were not. Without it what could not be converted is logged.

    Raises:
        TypeError: ``model`` is not a layer, an option that is not one of these.
        ValueError: the model is not built, ``only`` names or matches no normalization, a value that
            `SyncBatchNormalization` does not take.
        RuntimeError: in a graph or function, or in the scope of another strategy. After any of
            these errors the model is unchanged.

    Example:
        >>> model = syncbn.convert_sync_batchnorm(model)
        >>> type(model.layers[0]).__name__
        'SyncBatchNormalization'
    """
    taken = _arguments(SyncBatchNormalization) - _arguments(PLAIN_BATCH_NORMALIZATION)
    taken = {name for name in taken if not name.startswith("renorm")} | {"momentum"}
    chosen = _chosen(only, convertible(model), options)
    for given in (options, *chosen.values()):
        if unknown := sorted(set(given) - taken):
            raise TypeError(
                "Options must be arguments that SyncBatchNormalization has besides those of the "
                f"plain layer, or momentum: {', '.join(sorted(taken))}. "
                f"Received: {', '.join(unknown)}."
            )
        SyncBatchNormalization(name="any", **{"communicator": communicator, **options, **given})

    def options_of(name: str, layer: Any) -> dict[str, Any] | None:
        if name not in chosen:
            return None
        return {"communicator": communicator, **options, **chosen[name]}

    result = synchronize(model, options_of, _NOT_CHOSEN)
    if result.converted:
        rebuilding.remember(model)
    return _returned(result, return_conversion, _NOT_CHOSEN)


@overload
def revert_sync_batchnorm(model: Any, *, return_conversion: Literal[True]) -> Conversion: ...


@overload
def revert_sync_batchnorm(model: Any, *, return_conversion: Literal[False] = ...) -> Any: ...


def revert_sync_batchnorm(model: Any, *, return_conversion: bool = False) -> Any:
    """Converts the synchronized batch normalizations of a model to Keras' `BatchNormalization`.

    The reverse of `convert_sync_batchnorm`, likewise in place; also for models that were built
    with synchronized layers: those of this package, of Keras (``synchronized=True``), of tf_keras
    and of Horovod. What a plain layer does not have (communicator, groups, virtual batches) is
    dropped.

    `SyncCentering`, and layers with ``momentum=None``, have no plain counterpart and stay.

    Under MultiWorkerMirroredStrategy this is a collective call: all workers make it.

    Args:
        model: As for `convert_sync_batchnorm`.
        return_conversion: Likewise.

    Returns:
        As `convert_sync_batchnorm`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `convert_sync_batchnorm`.

    Example:
        >>> model = syncbn.convert_sync_batchnorm(model, group_size=8)
        >>> model = syncbn.revert_sync_batchnorm(model)
        >>> type(model.layers[0]).__name__
        'BatchNormalization'
    """

    def why_not(name: str, layer: Any) -> str | None:
        if not isinstance(layer, keras_api.BATCH_NORMALIZATION):
            return "has no plain counterpart"
        if layer.momentum is None:
            return "has momentum=None, which a plain layer cannot have"
        if type(layer) is PLAIN_BATCH_NORMALIZATION and not layer.synchronized:
            return _PLAIN_ALREADY
        return differs(layer)

    def make(name: str, layer: Any) -> Any:
        return PLAIN_BATCH_NORMALIZATION(**plain_config(layer))

    result = replace_layer(model, why_not, make)
    rebuilding.forget(model)
    return _returned(result, return_conversion, _PLAIN_ALREADY)


def _returned(result: Conversion, return_conversion: bool, expected: str) -> Any:
    """Returns what is asked for; logs why layers were not converted, unless that is expected."""
    if return_conversion:
        return result
    failed = [
        f"{name}: {why}"
        for name, why in result.unchanged.items()
        if why != expected and not why.endswith(" already")
    ]
    if failed:
        _log.warning("Not converted in %s: %s", result.model.name, "; ".join(failed))
    return result.model


def _chosen(
    only: Only, layers: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Returns the layers that are to be converted, by name: what they have besides ``options``."""
    if only is None:
        return {name: {} for name in layers}
    if isinstance(only, Advice):
        only = only.options()
        if _GROUPING & set(options):  # of the caller's own
            only = {name: {} for name in only}
    elif callable(only):
        return {name: {} for name, layer in layers.items() if only(name, layer)}
    if isinstance(only, Mapping):
        chosen, unknown = dict(only), sorted(set(only) - set(layers))
        wrong = [one for one in chosen.values() if not isinstance(one, Mapping)]
    else:
        patterns = [only] if isinstance(only, str) else list(only)
        wrong = [one for one in patterns if not isinstance(one, str)]
    if wrong:
        raise TypeError(
            "`only` must be names or patterns, a function, an Advice, or a mapping from names to "
            f"mappings of options. Received: {wrong[0]!r} in it."
        )
    if not isinstance(only, Mapping):
        matches = {pattern: fnmatch.filter(layers, pattern) for pattern in patterns}
        chosen = {name: {} for names in matches.values() for name in names}
        unknown = [pattern for pattern, names in matches.items() if not names]
    if unknown:
        raise ValueError(
            "`only` must be for normalizations of the model: "
            f"{', '.join(layers) or 'there are none'}. Received: {', '.join(unknown)}."
        )
    return chosen


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
