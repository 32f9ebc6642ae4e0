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
from syncbn._src.communicators.host_collectives import all_gather
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
    observed = _observed(model, layers, data, samples, batches, at_once, workers.rank, verbose)
    return _shared(*observed, layers, workers)


def _observed(
    model: Any,
    layers: Mapping[str, Any],
    data: Any,
    samples: int | None,
    batches: int,
    at_once: int,
    rank: int,
    verbose: int | str,
) -> tuple[list[np.ndarray], int, Exception | None]:
    """Returns what the layers see in each batch of a replica, and the samples of such a batch.

    That is an array ``(3, replicas, channels)`` for each time that the model runs, with the
    channels of all layers one after the other. An error is returned, since other workers wait.
    """
    statistics = {name: value for name, value in moving_statistics(model).items() if name in layers}
    observer = Observer(model, layers, statistics, at_once)
    runs = max(1, math.ceil(batches / at_once))
    verbose = 0 if rank else 1 if verbose == "auto" else verbose
    bar = keras_api.keras.utils.Progbar(runs, verbose=verbose, unit_name="run")
    moments: list[np.ndarray] = []
    try:
        inputs = map(observer.inputs, DatasetBatches(data, sys.maxsize, 1, 0))
        first = next(inputs, None)
        if first is not None:
            samples = samples or _length(first)
            for whole in _regrouped(itertools.chain([first], inputs), samples * at_once):
                seen = observer.observe(whole, observer.nothing())
                moments.append(np.concatenate([value.numpy() for value in seen.values()], 2))
                bar.update(len(moments))
                if len(moments) == runs:
                    break
    except Exception as error:
        return moments, 0, error
    return moments, samples or 0, None


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


def _shared(
    moments: list[np.ndarray],
    samples: int,
    error: Exception | None,
    layers: Mapping[str, Any],
    workers: Communicator,
) -> tuple[dict[str, BatchDistribution], int]:
    """Returns how the batches of all workers are distributed, and the samples of such a batch."""
    number = sum(one.shape[1] for one in moments)
    flags = np.array([error is not None, number, samples], np.float64)
    failed, numbers, sizes = all_gather(workers, flags, "syncbn/advise/batches").T
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError(
            "advise must succeed on all workers. Received: an error on rank "
            f"{', '.join(map(str, np.flatnonzero(failed)))}, which reports it."
        )
    if sum(numbers) < 2:
        raise ValueError(
            "advise needs two batches of replicas at least. Received: "
            + (f"fewer samples than {samples} for each of them." if samples else "no data.")
        )
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
    return named, int(max(sizes))
