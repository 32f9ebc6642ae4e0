"""The metrics of a model over all workers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import require_agreement, sum_arrays, sum_of_all
from syncbn._src.keras_compat import keras_api
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
    if workers.name == "tf.distribute" or workers.size == 1:
        return model.evaluate(x, y, **options)
    counter, logs = _BatchCounter(), {}
    given = options.pop("callbacks", None) or []
    callbacks = [*(given if isinstance(given, list | tuple) else [given]), counter]

    def own() -> np.ndarray:
        # Without a batch, Keras 3 has nothing to build a model under a strategy with.
        with contextlib.suppress(StopIteration):
            logs.update(model.evaluate(x, y, callbacks=callbacks, **options))
        if not counter.batches:
            raise ValueError(
                "evaluate needs a batch on each worker. Received: data without one on rank "
                f"{workers.rank}. Give that worker empty batches, by syncbn.training.join(dataset) "
                "on all workers."
            )
        return np.zeros(0)

    sum_of_all(workers, own, 0, "evaluate")
    variables = [variable for metric in model.metrics for variable in metric.variables]
    names = [getattr(variable, "path", variable.name) for variable in variables]
    require_agreement(workers, [str(tuple(one.shape)) for one in variables], names, "metrics")
    return joint_logs(workers, logs, joint_results(model, workers))


def joint_results(model: Any, workers: Communicator) -> dict[str, Any]:
    """Returns the values of the model's metrics over all workers.

    The metrics themselves stay as they are. All workers make the call, over Horovod or MPI.
    """
    variables = [variable for metric in model.metrics for variable in metric.variables]
    if not variables:
        return {}
    own = [np.asarray(variable.numpy()) for variable in variables]
    totals = sum_arrays(workers, [value.astype(np.float64) for value in own], "syncbn/metrics")
    try:
        for variable, total in zip(variables, totals, strict=True):
            variable.assign(total.astype(variable.numpy().dtype))
        results = model.get_metrics_result()
        return {name: np.asarray(result).tolist() for name, result in results.items()}
    finally:
        for variable, value in zip(variables, own, strict=True):
            variable.assign(value)


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
