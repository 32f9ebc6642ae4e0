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
from syncbn._src.communicators.host_collectives import gather_of_all, sum_of_all
from syncbn._src.models.activation_statistics import Observer
from syncbn._src.models.dataset_batches import DatasetBatches, end_line, progress_bar
from syncbn._src.models.statistics import (
    channels_of,
    moving_statistics,
    require_same_normalizations,
)
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
    require_same_normalizations(workers, layers)
    observer = Observer(model, layers, replicas=at_once)
    statistics = moving_statistics(model)  # under a strategy, a call of all workers
    observer.start({name: statistics[name] for name in layers})
    inputs = map(
        observer.inputs, DatasetBatches(data, steps=sys.maxsize, passes=1, verbose=0, name="data")
    )
    given: list[Any] = []

    def first_length() -> np.ndarray:
        given.extend(itertools.islice(filter(_length, inputs), 1))
        return np.array([_length(given[0]) if given else 0])

    rows = gather_of_all(workers, first_length, 1, "advise")
    lengths = {int(one) for one in rows[:, 0]} - {0}
    if not lengths:
        raise ValueError("advise needs two batches of replicas at least. Received: no data.")
    if samples is None and len(lengths) > 1:
        raise ValueError(
            "advise needs batches of one size. Received: workers with first batches of "
            f"{' and '.join(map(str, sorted(lengths)))} samples. Give the samples of a replica: "
            "batch=."
        )
    samples = samples or lengths.pop()
    moments: list[np.ndarray] = []
    runs = math.ceil(batches / at_once)
    bar = progress_bar(runs, 0 if workers.rank else verbose, "run")

    def observe() -> np.ndarray:
        for whole in _regrouped(itertools.chain(given, inputs), samples * at_once):
            seen = observer.observe(whole, observer.nothing())
            moments.append(np.concatenate([value.numpy() for value in seen.values()], 2))
            bar.update(len(moments))
            if len(moments) == runs:
                break
        return np.array([len(moments)], np.float64)

    (number,) = sum_of_all(workers, observe, 1, "advise")
    end_line(bar, len(moments))
    if not number:
        raise ValueError(
            f"advise needs {samples * at_once} samples at least, for {at_once} replicas with "
            f"{samples} each. Received: fewer."
        )
    return _distributions(moments, layers, workers), samples


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
    channels = [channels_of(layer) for layer in layers.values()]
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
