"""Whether the replicas of a model agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import DIGEST_PARTS, digest
from syncbn._src.keras_compat.layer_names import full_name, short_name
from syncbn._src.layers.synchronized_layer import SynchronizedLayer
from syncbn._src.models import in_place
from syncbn._src.models.statistics import normalizations, uncalled
from syncbn._src.models.training_job import TrainingJob, job_of
from syncbn._src.training.kept_local import local_in


def assert_synchronized(
    model: Any, communicator: str | Communicator = "auto", *, weights: bool = False
) -> None:
    """Checks that a model's moving statistics are the same on all replicas, bit for bit.

    All workers make the call, between steps. It takes one all-reduce of 17 numbers for each replica
    where they agree, and one more where they do not. Under tf.distribute it compares the
    per-replica copies; reading a statistic gives only their mean.

    Args:
        model: A built model or layer of `tf.keras`. The statistics are those of the layers of this
            package and of Keras' `BatchNormalization`. What its optimizers keep local (see
            `syncbn.training.distribute`) is not compared.
        communicator: The communicator: as for `syncbn.SyncBatchNormalization`, and
            ``"auto"`` also finds the strategy that the model was built under.
        weights: Whether to compare all weights of the model.

    Raises:
        ValueError: a replica has other values than the first, or another model. Raised on all
            workers; it names the first layer that differs, and the first rank on which it does.
            Also where there is nothing to compare, and where the call of a synchronized layer is
            not what runs.
        RuntimeError: the call is made inside of a graph or of a replica.

    Example:
        >>> syncbn.assert_synchronized(model)  # raises where replicas differ
        >>> syncbn.assert_synchronized(model, weights=True)
    """
    job = job_of(model, communicator)
    what = "weights" if weights else "moving statistics"
    names, rows = [], []
    for name, weight in _shared(model, _weights(model) if weights else _statistics(model)):
        names.append(name)
        rows.append([_digests(copy.numpy()) for copy in job.copies(weight)])
    digests = np.reshape(rows, (len(names), len(job.ranks), 2 * DIGEST_PARTS)).swapaxes(0, 1)
    summaries = [[len(names), *digest(replica.tobytes())] for replica in digests]
    gathered = job.gather([np.asarray(own) for own in summaries], "syncbn/synchronized")
    if (gathered != gathered[0]).any():
        # All workers get here, as all have seen the same rows.
        raise ValueError(_difference(job, names, digests, int(gathered[:, 0].max()), what))
    if not names:
        raise ValueError(
            f"`model` must have {what} to compare. Received: {model.name!r}, which has none. Build "
            "it first, by a call or by fit."
        )
    # Last, so that a worker on which this fails leaves no other waiting here.
    _require_own_calls(model)


def _require_own_calls(model: Any) -> None:
    """Raises where what runs in training is not the call of a synchronized layer."""
    for name, reason in uncalled(model).items():
        raise ValueError(f"Each normalization must be called. Received: {name}, which {reason}.")
    for name, layer in normalizations(model).items():
        replaced = in_place.replaced_methods(layer)
        if replaced and isinstance(layer, SynchronizedLayer):
            raise ValueError(
                "A synchronized layer must run its class's methods. Received: the object "
                f"{name}, which overrides {', '.join(replaced)}. Remove the override: del layer."
                f"{replaced[0]}."
            )


def _difference(
    job: TrainingJob, names: list[str], digests: np.ndarray, count: int, what: str
) -> str:
    """Returns the message about what differs, and where. A collective call."""
    padded = np.zeros((len(job.ranks), count, 2, DIGEST_PARTS))
    padded[:, : len(names)] = digests.reshape(len(job.ranks), len(names), 2, DIGEST_PARTS)
    every = job.gather([own.ravel() for own in padded], "syncbn/synchronized/each")
    kinds, values = np.moveaxis(every.reshape(job.size, count, 2, DIGEST_PARTS), 2, 0)
    other_kinds = (kinds != kinds[0]).any(-1)
    differs = other_kinds if other_kinds.any() else (values != values[0]).any(-1)
    first = int(differs.any(0).argmax())
    rank = int(differs[:, first].argmax())
    name = names[first] if first < len(names) else "missing"
    if other_kinds.any():
        return (
            f"All replicas must have the same model. Received: number {first} of its {what} has "
            f"another shape or dtype on rank {rank} than on rank 0, or only one of them has it; on "
            f"this rank, {job.ranks[0]}, it is {name}. Build the same model, from the same "
            "arguments, on every worker."
        )
    ranks = ", ".join(map(str, np.flatnonzero(differs.any(1))))
    return (
        f"The {what} must be the same on all replicas. Received: another {name} on rank {rank} "
        f"than on rank 0; in all, {int(differs.any(0).sum())} of {count} differ, on rank {ranks}. "
        "Start from equal weights (syncbn.training.broadcast), let every replica make every "
        "training call, and use synchronized layers."
    )


def _shared(model: Any, named: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    owns = local_in(model).among(weight for _, weight in named)
    return [one for one, own in zip(named, owns, strict=True) if not own]


def _statistics(model: Any) -> list[tuple[str, Any]]:
    # Also what a layer has beside them, such as the statistics of batch renormalization.
    return [
        (f"{short_name(weight)} of {name}", weight)
        for name, layer in normalizations(model).items()
        for weight in layer.non_trainable_weights
    ]


def _weights(model: Any) -> list[tuple[str, Any]]:
    weights = model.weights if model.built else []
    return [(full_name(weight), weight) for weight in weights]


def _digests(value: np.ndarray) -> np.ndarray:
    """Returns digests of an array's dtype and shape and of its content, ``(2 * DIGEST_PARTS,)``."""
    kind = digest(f"{value.dtype.name} {value.shape}".encode())
    return np.concatenate([kind, digest(value.tobytes())])
