"""Population statistics for the normalizations of a model, exact if need be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import require_agreement, sum_of_all
from syncbn._src.models.activation_statistics import Observer
from syncbn._src.models.dataset_batches import DatasetBatches
from syncbn._src.models.statistics import (
    MovingStatistics,
    moving_statistics,
    normalizations,
    set_moving_statistics,
)
from syncbn._src.models.training_job import job_of
from syncbn._src.ops.moments import Moments, Sums, pack, sums_of, unbiased, unpack


def recalibrate(
    model: Any,
    dataset: Iterable[Any],
    communicator: str | Communicator = "auto",
    *,
    exact: bool = False,
    steps: int | None = None,
    verbose: int | str = "auto",
) -> None:
    """Sets the moving statistics of a model by a pass over a dataset ("precise BN").

    Moving averages remember only the last batches, as seen with older weights. After the weights
    have changed otherwise than by training (averaged as in SWA and EMA, pruned, rounded), or before
    a model is evaluated, this gives each normalization, this package's and Keras' own
    `BatchNormalization`, the mean and variance of all elements that it sees in a dataset. Each
    worker goes through its own dataset, and every element on every worker has the same weight,
    however they are distributed; a worker may have no batches at all.

    The model runs as for inference, and nothing but the moving statistics changes. With a mask, the
    statistics are those of the elements where it is true. The inputs of a layer that is used twice
    are pooled. Frozen layers (``trainable=False``), and those that the model does not call at
    inference, keep their statistics.

    What a layer sees depends on how those before it normalize:

    - By default with the statistics of the current batch, of this worker alone: one pass over the
      dataset, which costs about one inference. The larger the batches, the nearer to ``exact``.
    - With ``exact=True`` with the population statistics that they will have. The result is what
      each layer sees at inference; only a layer that is used twice, and so may see what has gone
      through it before, takes the batch's for that. One pass for each normalization.

    Workers exchange sums only at the end of a pass, in one collective, and get bitwise equal
    results. All of them make this call. Under tf.distribute each process computes on one device,
    and sets the statistics of all of its replicas. ``renorm_mean`` and ``renorm_stddev`` stay as
    they are: inference does not use them.

    Args:
        model: A model or layer of `tf.keras`, built.
        dataset: Batches as `Model.predict` takes them: ``x``, ``(x, y)`` or
            ``(x, y, sample_weight)``, of which ``x`` is used. A model with a custom
            ``predict_step`` gets them whole. A `tf.data.Dataset`, a `tf.keras.utils.Sequence`, or
            another iterable, of which at most ``len(dataset)`` batches are taken if it has a
            length; with ``exact`` it must be iterable more than once, over the same elements each
            time. Under tf.distribute an ordinary dataset too, each worker's own.
        communicator: As for `syncbn.SyncBatchNormalization`.
        exact: Whether to go layer by layer, in the order in which the model calls them.
        steps: The most batches to take on this worker, or ``None`` for all.
        verbose: 1 or ``"auto"`` for a progress bar on rank 0, 2 for its last line, 0 for silence.

    Raises:
        ValueError: no worker has a batch; the model is not built, or has no normalization that is
            not frozen; what one sees is not finite, on whichever worker; workers have different
            models; the dataset has no end, or cannot be iterated again.
        TypeError: ``dataset`` is not an iterable of batches.
        NotImplementedError: the model calls a normalization in a loop or branch of its graph.
        RuntimeError: another worker failed; the call is made in a graph or in a replica; and see
            `syncbn.resolve`.

        After any of these the model is unchanged, on all workers.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.

    Example:
        >>> dataset = tf.data.Dataset.from_tensor_slices(x).batch(4)
        >>> syncbn.recalibrate(model, dataset, exact=True, verbose=0)
        >>> mean, variance, _ = syncbn.moving_statistics(model)["normalization"]
        >>> np.allclose(mean, x.mean(0), atol=1e-6)
        True
    """
    Recalibration(model, communicator).run(dataset, exact=exact, steps=steps, verbose=verbose)


class Recalibration:
    """Recalibrates a model as often as it is asked to, and traces it once; see `recalibrate`."""

    def __init__(self, model: Any, communicator: str | Communicator) -> None:
        self._model, self._workers = model, job_of(model, communicator).workers()
        self._observer: Observer | None = None

    def run(
        self, dataset: Iterable[Any], *, exact: bool, steps: int | None, verbose: int | str
    ) -> None:
        """Does what `recalibrate` does; the arguments are its."""
        model, workers = self._model, self._workers
        before, layers = moving_statistics(model), normalizations(model)
        _require_same_call(workers, model, layers, exact)
        if not model.built:
            raise ValueError(
                "recalibrate needs a model that is built. "
                f"Received: {model.name}, which is not. Call it once on a batch."
            )
        pending = [name for name, layer in layers.items() if layer.trainable]
        if not pending:
            raise ValueError(
                "recalibrate needs normalizations that are not frozen. Received: "
                f"{model.name} with {f'{len(layers)}, all of them frozen' if layers else 'none'}."
            )
        if self._observer is None:
            self._observer = Observer(model, layers)
        observer = self._observer
        observer.start(before)
        passes = len(pending) if exact else 1
        batches = DatasetBatches(dataset, steps, passes, 0 if workers.rank else verbose)
        measured: dict[str, MovingStatistics] = {}
        while pending:
            seen = _measure(observer, batches, workers)
            # In the order of execution, without those that have seen nothing.
            pending = [name for name in seen if name in pending]
            chosen = pending[:1] if exact else pending
            for name in chosen:
                measured[name] = _statistics(name, layers[name], seen[name], before[name])
                observer.fix(name, measured[name])
            pending = pending[len(chosen) :]
        if not measured:
            raise ValueError(
                "recalibrate needs elements in the inputs of normalizations. Received: none, as "
                "batches are empty, masks leave nothing, or the model calls none of them at "
                "inference."
            )
        set_moving_statistics(model, measured)
        batches.end()


def _measure(
    observer: Observer, batches: DatasetBatches, workers: Communicator
) -> dict[str, np.ndarray]:
    """Returns what each layer sees on all workers together, in the order of execution.

    Raises:
        Exception: the error that stopped this worker.
        RuntimeError: another worker was stopped.
        ValueError: there are no batches.
    """
    nothing = observer.nothing()
    sizes = [1, len(nothing), *(int(tf.size(one)) for one in nothing.values())]

    def own() -> np.ndarray:
        seen, started = nothing, 0.0
        for batch in batches:
            seen, started = observer(batch, seen), 1.0
        # Workers without a batch do not know the order, and add nothing to it.
        order = [observer.order.get(name, 0.0) for name in seen]
        packed = [pack(sums_of(Moments(*tf.unstack(one)))).numpy() for one in seen.values()]
        return np.concatenate([[started], order, *packed])

    total = sum_of_all(workers, own, sum(sizes), "recalibrate")
    (started,), order, *packed = np.split(total, np.cumsum(sizes)[:-1])
    if not started:
        raise ValueError(
            "recalibrate needs a batch on one worker at least. Received: an empty `dataset`"
            + (f" on all {workers.size} workers." if workers.size > 1 else ".")
        )
    merged = {
        name: tf.stack(unpack(tf.constant(part), Sums(*tf.unstack(one)))).numpy()
        for (name, one), part in zip(nothing.items(), packed, strict=True)
    }
    names = [name for _, name in sorted(zip(order, nothing, strict=True))]
    return {name: merged[name] for name in names if merged[name][0].any()}


def _statistics(
    name: str, layer: Any, seen: np.ndarray, before: MovingStatistics
) -> MovingStatistics:
    """Returns what the layer's statistics should be."""
    if not np.isfinite(seen).all():
        raise ValueError(
            "recalibrate needs finite activations. Received: NaN or infinity in the inputs of "
            f"{name}, on some worker. Look at the data, and at the layers that come before it; "
            "what normalizations before it see is finite."
        )
    moments = Moments(*seen)
    if getattr(layer, "unbiased_moving_variance", False):
        moments = unbiased(moments)
    count, mean, variance = map(np.asarray, moments)
    pairs = zip((mean, variance, count), before, strict=True)
    return MovingStatistics(*(old if old is None else new.reshape(old.shape) for new, old in pairs))


def _require_same_call(
    workers: Communicator, model: Any, layers: Mapping[str, Any], exact: bool
) -> None:
    kinds = {
        name: f"{tuple(layer.moving_mean.shape)}{'' if layer.trainable else ', frozen'}"
        for name, layer in layers.items()
    }
    state = f"{'built' if model.built else 'not built'}, exact={exact}"
    require_agreement(
        workers,
        [state, *(f"{name} {kind}" for name, kind in kinds.items())],
        ["the call", *kinds],
        "normalizations, and the same arguments of recalibrate",
    )
