"""The metrics of a model over all workers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator, joins_by_messages
from syncbn._src.communicators.host_collectives import (
    require_agreement,
    require_success,
    sum_arrays,
)
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import full_name
from syncbn._src.models.training_job import job_of


def evaluate(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    communicator: str | Communicator = "auto",
    verbose: int | str = 0,
    **options: Any,
) -> dict[str, Any]:
    """Returns the loss and metrics of a model over the data of all workers.

    `Model.evaluate` returns on each worker the numbers of its own data, and neither these nor their
    mean are those of all samples. Here the sums and counts that make up each metric are summed over
    the workers, so that every sample has the same weight, and metrics that are not means (AUC, say)
    are right too. What a custom ``test_step`` returns besides metrics is averaged over the workers.
    All workers make the call, each with data of its own, which may differ in number; all get the
    same result. With moving statistics that differ between workers, each uses its own.

    Under tf.distribute this is `Model.evaluate`, which adds up by itself; where each process of a
    job has a strategy, it sums over the processes too.

    Args:
        model: A compiled model.
        x: As for `Model.evaluate`: this worker's data. One that has none at all takes part with
            empty batches: ``training.join(dataset)``.
        y: Likewise.
        communicator: As for `syncbn.SyncBatchNormalization`.
        verbose: As for `Model.evaluate`, on rank 0; the numbers in the progress bar are its own.
        options: The other arguments of `Model.evaluate`, such as ``callbacks``.

    Returns:
        The values by the metrics' names, such as ``{"loss": 0.21, "accuracy": 0.93}``.

    Raises:
        ValueError: a worker has no batch; workers have different metrics.
        RuntimeError: another worker failed; and see `syncbn.resolve`.

    Example:
        >>> sorted(syncbn.training.evaluate(model, x, y))
        ['loss']
    """
    workers = job_of(model, communicator).workers()
    options |= {"return_dict": True, "verbose": 0 if workers.rank else verbose}
    if not joins_by_messages(workers):
        return model.evaluate(x, y, **options)
    counter, logs = _BatchCounter(), {}
    given = options.pop("callbacks", None) or []
    callbacks = [*(given if isinstance(given, list | tuple) else [given]), counter]

    def own() -> None:
        # Without a batch, Keras 3 has nothing to build a model under a strategy with.
        with contextlib.suppress(StopIteration):
            logs.update(model.evaluate(x, y, callbacks=callbacks, **options))
        if not counter.batches:
            raise ValueError(
                "evaluate needs a batch on each worker. Received: data without one on rank "
                f"{workers.rank}. Give that worker empty batches, by syncbn.training.join(dataset) "
                "on all workers."
            )

    require_success(workers, own, "evaluate")
    variables = _variables(model)
    names = [full_name(variable) for variable in variables]
    require_agreement(workers, [str(tuple(one.shape)) for one in variables], names, "metrics")
    return joint_logs(workers, logs, joint_results(model, workers))


def joint_results(
    model: Any, workers: Communicator, own: list[np.ndarray] | None = None
) -> dict[str, Any]:
    """Returns the values of the model's metrics over all workers.

    The metrics themselves stay as they are. All workers make the call, over Horovod or MPI.

    Args:
        model: The model.
        workers: The communicator of the workers.
        own: What this worker's metrics have added up; ``None`` for what they have now.
    """
    variables, now = _variables(model), _values(model)
    if not variables:
        return {}
    own = now if own is None else own
    totals = sum_arrays(workers, [value.astype(np.float64) for value in own], "syncbn/metrics")
    try:
        for variable, total in zip(variables, totals, strict=True):
            variable.assign(total.astype(variable.numpy().dtype))
        results = model.get_metrics_result()
        return {name: np.asarray(result).tolist() for name, result in results.items()}
    finally:
        for variable, value in zip(variables, now, strict=True):
            variable.assign(value)


class MetricsBeforeReset:
    """What the metrics of a model had added up when they were reset first, since it was set None.

    Args:
        model: The model, whose `reset_metrics` is replaced until the `end`.
    """

    def __init__(self, model: Any):
        self.values: list[np.ndarray] | None = None
        before = getattr(model.reset_metrics, "__self__", None)
        if isinstance(before, MetricsBeforeReset):  # of a `fit` that failed
            before.end()
        self._model, self._reset = model, model.reset_metrics
        self._own = vars(model).get("reset_metrics")
        model.reset_metrics = self._keep_and_reset

    def end(self) -> None:
        """Lets the model reset its metrics as before."""
        if self._model.reset_metrics == self._keep_and_reset:
            del self._model.reset_metrics
            if self._own is not None:
                self._model.reset_metrics = self._own

    def _keep_and_reset(self) -> None:
        # Not where a step of the model's own is traced, which resets them in each step.
        if self.values is None and tf.executing_eagerly():
            self.values = _values(self._model)
        self._reset()


def _variables(model: Any) -> list[Any]:
    return [variable for metric in model.metrics for variable in metric.variables]


def _values(model: Any) -> list[np.ndarray]:
    return [np.asarray(variable.numpy()) for variable in _variables(model)]


def joint_logs(
    workers: Communicator, logs: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns logs with the ``results`` of all workers, and the mean over them of all others."""
    others = sorted(name for name in logs if name not in results)
    own = [np.asarray(logs[name], np.float64) for name in others]
    totals = sum_arrays(workers, own, "syncbn/logs")
    averages = [(total / workers.size).tolist() for total in totals]
    joint = {**results, **dict(zip(others, averages, strict=True))}
    return {name: joint[name] for name in logs}


class _BatchCounter(keras_api.keras.callbacks.Callback):
    """Counts the batches that are evaluated."""

    batches = 0

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
