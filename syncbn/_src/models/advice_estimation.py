"""What is advised for a model: judged from data, and timed in the job or by a calculation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.communicators.base import Communicator
from syncbn._src.models import network_costs
from syncbn._src.models.replica_observation import observe_replicas
from syncbn._src.models.statistics import all_normalizations, channels_of, normalizations
from syncbn._src.models.statistics_errors import BatchDistribution, statistics_error
from syncbn._src.models.synchronization_advice import Advice, LayerAdvice, looked_at_sizes
from syncbn._src.models.training_job import TrainingJob, job_of

TOLERANCE = 0.25
"""The largest error, in standard deviations; what it rests on is in docs/advice.md."""
_AT_ONCE = 8
_CALL = 39e-6
"""Seconds in TensorFlow around a collective, as measured over MPI: docs/scaling.md."""


def advise(
    model: Any,
    data: Iterable[Any],
    replicas: int | None = None,
    *,
    batch: int | None = None,
    communicator: str | Communicator = "auto",
    batches: int = 64,
    tolerance: float = TOLERANCE,
    network: tuple[float, float] = (20e-6, 1 / 3e9),
    verbose: int | str = "auto",
) -> Advice:
    """Says which normalizations of a model need the statistics of other replicas, and of how many.

    Runs some batches through the model, with each normalization using the statistics of several
    replicas, and compares the mean and variance that each of the replicas has for itself. From how
    they differ follows the error of the statistics of 1, 2, 4, ... replicas together, and how many
    independent elements a replica has: a hundred pixels of an image may be worth three. Nothing of
    the model changes.

    A layer whose error with one replica is within the tolerance may stay plain. Up to twice that,
    it gains from synchronization; beyond, it needs it. Either should have the statistics of at
    least as many replicas as bring the error within the tolerance. That costs the same with more of
    them, or less (a group needs another message for the moving statistics), so the advice is all
    replicas, or a group of no more than 128 samples.

    This is about the statistics, not about the accuracy that depends on them: see docs/advice.md
    for what the tolerance rests on, and for what is not seen.

    Args:
        model: A built model or layer of `tf.keras`, with plain or synchronized normalizations.
        data: Batches as `Model.fit` takes them, of any size, also without end. In a job of several
            workers each worker gives its own.
        replicas: How many replicas the model is to be trained on; by default those of the job.
        batch: The samples that a replica has in a step; by default those of the first batch.
        communicator: The one to measure, as for `syncbn.report`.
        batches: The batches of replicas to take, on each worker.
        tolerance: The largest error of a normalized element, in its standard deviations.
        network: Where the job does not have ``replicas``, so that nothing is measured: the seconds
            that a message takes, and those for each byte; as assumed of TCP with 25 Gbit/s by
            default.
        verbose: 1 or ``"auto"`` for a progress bar on rank 0, 0 for silence.

    Returns:
        The advice: a table, when printed by `print` or by rich.

    Raises:
        ValueError: a single replica, or a number that is not positive; too few samples; workers
            with other models, or batches of other sizes; the model is not built, or has no
            normalization that is not frozen; what one sees is not finite; batches that differ in
            more than their first dimension, or a layer that does not keep the samples in order
            along the first dimension.
        TypeError: ``data`` is not an iterable of batches.
        NotImplementedError: the model calls a normalization in a loop or branch of its graph.
        RuntimeError: another worker failed; the call is made in a graph or in a replica; and see
            `syncbn.resolve`.

    Source of the formulas: `syncbn/_src/models/statistics_errors.py`.

    Example:
        >>> advice = syncbn.advise(model, [(x, y)], replicas=4, batch=2, verbose=0)
        >>> advice.layers[0].elements, [error.replicas for error in advice.layers[0].errors]
        (2.0, [1, 2, 4])
        >>> model = syncbn.convert_sync_batchnorm(model, only=advice)
    """
    for name, given in ("replicas", replicas), ("batch", batch), ("batches", batches):
        if given is not None:
            at_least_one(name, given)
    job = job_of(model, communicator)
    size = job.size if replicas is None else replicas
    if size < 2:
        raise ValueError(
            f"advise is about several replicas. Received: {size}"
            + (", as in this job. " if replicas is None else ". ")
            + "Give the number that the model is to be trained on, as in "
            "advise(model, data, replicas=8)."
        )
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive. Received: tolerance={tolerance}.")
    layers = {name: layer for name, layer in normalizations(model).items() if layer.trainable}
    if not model.built or not layers:
        found = all_normalizations(model)
        state = "which is not built" if not model.built else f"which has {len(found) or 'none'}"
        state += ", all of them frozen or not built" if model.built and found else ""
        raise ValueError(
            "advise needs a model that is built, with normalizations that are not frozen. "
            f"Received: {model.name}, {state}."
        )
    distributions, samples = observe_replicas(
        model, layers, data, batch, batches, min(size, _AT_ONCE), job.workers(), verbose
    )
    rows = []
    for name, layer in all_normalizations(model).items():
        row = LayerAdvice(name, type(layer).__name__)
        if name not in layers:
            rows.append(row._replace(note="frozen" if layer.built else "not built"))
        elif not distributions[name].elements.any():
            rows.append(row._replace(note="sees nothing"))
        else:
            rows.append(_judged(row, layer, distributions[name], size, tolerance))
    advice = Advice(tuple(rows), size, samples, tolerance)
    if job.size == size:
        return _measured(advice, layers, job)
    return _calculated(advice, layers, network)


def _judged(
    row: LayerAdvice, layer: Any, batch: BatchDistribution, replicas: int, tolerance: float
) -> LayerAdvice:
    epsilon = layer.epsilon if hasattr(layer, "moving_variance") else None
    errors = tuple(statistics_error(batch, size, epsilon) for size in looked_at_sizes(replicas))
    within = (error.replicas for error in errors if error.output <= tolerance)
    return row._replace(
        elements=float(np.mean(batch.elements)),
        independent=batch.independent,
        errors=errors,
        enough=next(within, None),
    )


def _measured(advice: Advice, layers: Mapping[str, Any], job: TrainingJob) -> Advice:
    """Returns the advice with what a step waits for each layer, measured in the job."""
    latencies: dict[int, float] = {}
    # Groups make one more, but for those of a strategy, of which each has a row in the same.
    messages = 2 if advice.group_size is None or job.strategy is not None else 3

    def timed(row: LayerAdvice) -> LayerAdvice:
        if not row.errors:
            return row
        # Back goes one number less, which takes no less time.
        length = _channels(layers[row.name]) + 1
        if length not in latencies:
            latencies[length] = job.latency(length, tf.float64)
        second = latencies[length]
        return row._replace(seconds=2 * second, seconds_in_groups=messages * second)

    rows = tuple(timed(row) for row in advice.layers)
    return advice._replace(layers=rows, measured=job.communicator.name)


def _calculated(advice: Advice, layers: Mapping[str, Any], network: tuple[float, float]) -> Advice:
    """Returns the advice with what a step waits for each layer, by a model of the network."""
    costs, workers = network_costs.network(*network), _power_of_two(advice.replicas)
    group = None if advice.group_size is None else _power_of_two(advice.group_size)

    def timed(row: LayerAdvice) -> LayerAdvice:
        if not row.errors:
            return row
        # The model counts two numbers for each channel.
        channels = [math.ceil(_channels(layers[row.name]) / 2)]
        every, in_groups = (
            network_costs.added(costs, channels, workers, size, _CALL) for size in (None, group)
        )
        return row._replace(seconds=every, seconds_in_groups=in_groups)

    return advice._replace(layers=tuple(timed(row) for row in advice.layers))


def _channels(layer: Any) -> int:
    """Returns how many numbers a layer has of its channels: means, and maybe variances."""
    return channels_of(layer) * (2 if hasattr(layer, "moving_variance") else 1)


def _power_of_two(number: int) -> int:
    return 2 ** (number - 1).bit_length()
