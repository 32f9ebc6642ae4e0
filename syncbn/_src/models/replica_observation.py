"""What the normalizations of a model see in the batches of several replicas."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.fingerprints import sums
from syncbn._src.communicators.host_collectives import sum_of_all
from syncbn._src.keras_compat import keras_api
from syncbn._src.models.activation_statistics import Observer
from syncbn._src.models.dataset_batches import DatasetBatches
from syncbn._src.models.statistics import moving_statistics
from syncbn._src.models.statistics_errors import (
    BatchDistribution,
    ReplicaMoments,
    batch_distribution,
)


def observe_replicas(
    model: Any,
    layers: Mapping[str, Any],
    data: Any,
    samples: int | None,
    batches: int,
    at_once: int,
    workers: Communicator,
    verbose: int | str,
) -> tuple[dict[str, BatchDistribution], int]:
    """Returns how the batches of replicas differ for each layer, and the samples of such a batch.

    Args:
        model: The model to run, as for inference but with the statistics of ``at_once`` replicas.
        layers: Its normalizations, by name.
        data: Batches as `Model.fit` takes them; this worker's.
        samples: The samples of a replica's batch, or ``None`` for those of the first in ``data``.
        batches: How many batches of replicas to take.
        at_once: How many of them the model gets at a time.
        workers: The communicator of the workers, all of which make this call.
        verbose: As for `advise`.
    """
    observer = Observer(model, layers, replicas=at_once)
    statistics = moving_statistics(model)  # under a strategy, a call of all workers
    observer.start({name: statistics[name] for name in layers})
    moments: list[np.ndarray] = []

    def own() -> np.ndarray:
        size = _observe(observer, moments, data, samples, batches, at_once, bar)
        sizes = np.zeros(1 + workers.size)
        sizes[0], sizes[1 + workers.rank] = sum(one.shape[1] for one in moments), size
        return sizes

    verbose = 0 if workers.rank else 1 if verbose == "auto" else verbose
    runs = max(1, math.ceil(batches / at_once))
    bar = keras_api.keras.utils.Progbar(runs, verbose=verbose, unit_name="run")
    number, *sizes = sum_of_all(workers, own, 1 + workers.size, "advise")
    samples = int(max(sizes))
    if number < 2:
        raise ValueError(
            "advise needs two batches of replicas at least. Received: "
            + (f"fewer samples than {samples} for each of them." if samples else "no data.")
        )
    return _distributions(moments, layers, workers), samples


def _observe(
    observer: Observer,
    moments: list[np.ndarray],
    data: Any,
    samples: int | None,
    batches: int,
    at_once: int,
    bar: Any,
) -> int:
    """Runs the model, and returns the samples of a replica's batch, if there was any data.

    Args:
        observer: The observer of the model.
        moments: Gets an array ``(3, replicas, channels)`` each time that the model runs, with the
            channels of all layers one after the other.
        data: As for `observe_replicas`, as are the next three.
        samples: Likewise.
        batches: Likewise.
        at_once: Likewise.
        bar: The progress bar.
    """
    inputs = map(observer.inputs, DatasetBatches(data, sys.maxsize, 1, 0))
    first = next(inputs, None)
    if first is None:
        return 0
    samples = samples or _length(first)
    for whole in _regrouped(itertools.chain([first], inputs), samples * at_once):
        seen = observer.observe(whole, observer.nothing())
        moments.append(np.concatenate([value.numpy() for value in seen.values()], 2))
        bar.update(len(moments))
        if len(moments) * at_once >= batches:
            break
    return samples


def _length(batch: Any) -> int:
    return int(tf.nest.flatten(batch)[0].shape[0])


def _regrouped(batches: Iterator[Any], samples: int) -> Iterator[Any]:
    """Yields batches of so many samples, made of those given; what is left over is left out."""
    waiting: list[Any] = []
    number = 0
    for batch in batches:
        waiting.append(tf.nest.map_structure(np.asarray, batch))
        number += _length(batch)
        if number < samples:
            continue
        shapes = {str([part.shape[1:] for part in tf.nest.flatten(one)]) for one in waiting}
        if len(shapes) > 1:
            raise ValueError(
                "Batches must have the same shapes but for the first dimension. Received: "
                f"{' and '.join(sorted(shapes))}. Pad them alike."
            )
        whole = tf.nest.map_structure(lambda *parts: np.concatenate(parts), *waiting)
        for start in range(0, number - samples + 1, samples):
            yield tf.nest.map_structure(lambda part: part[start : start + samples], whole)  # noqa: B023
        rest = number % samples
        waiting = [tf.nest.map_structure(lambda part: part[len(part) - rest :], whole)]  # noqa: B023
        number = rest


def _distributions(
    moments: list[np.ndarray], layers: Mapping[str, Any], workers: Communicator
) -> dict[str, BatchDistribution]:
    """Returns how the batches of all workers differ, for each layer."""
    channels = [math.prod(layer.moving_mean.shape) for layer in layers.values()]
    own = np.concatenate(moments or [np.zeros([3, 0, sum(channels)])], 1)

    def add_up(values: np.ndarray) -> np.ndarray:
        return sums(workers)(tf.constant(values), "syncbn/advise/moments").numpy()

    whole = batch_distribution(ReplicaMoments(*own), add_up)
    parts = zip(*(np.split(part, np.cumsum(channels)[:-1]) for part in whole), strict=True)
    named = dict(zip(layers, map(BatchDistribution._make, parts), strict=True))
    for name, one in named.items():
        if not all(np.isfinite(part).all() for part in one):
            raise ValueError(
                "advise needs finite activations. Received: NaN or infinity in the inputs of "
                f"{name}, on some worker. Look at the data, and at the layers that come before it."
            )
    return named
