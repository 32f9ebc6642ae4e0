"""Collectives of the workers outside of the graph: on arrays, and to check that they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from syncbn._src.communicators.base import Communicator, wire_dtype
from syncbn._src.communicators.fingerprints import sums

DIGEST_PARTS = 16
"""The length of a `digest`."""


def sum_arrays(
    communicator: Communicator, arrays: Sequence[np.ndarray], name: str
) -> list[np.ndarray]:
    """Returns the sums over all workers, in one collective for each dtype.

    Args:
        communicator: The communicator of the workers.
        arrays: Floating, with the same shapes and dtypes on all workers.
        name: The name of the collectives.
    """
    totals: list[np.ndarray] = [np.empty(0)] * len(arrays)
    for dtype in sorted({array.dtype.name for array in arrays}):
        chosen = [index for index, array in enumerate(arrays) if array.dtype.name == dtype]
        flat = np.concatenate([arrays[index].ravel() for index in chosen])
        wire = tf.cast(flat, wire_dtype(tf.as_dtype(dtype)))
        total = sums(communicator)(wire, f"{name}/{dtype}").numpy().astype(flat.dtype)
        ends = np.cumsum([arrays[index].size for index in chosen])
        for index, part in zip(chosen, np.split(total, ends[:-1]), strict=True):
            totals[index] = part.reshape(arrays[index].shape)
    return totals


def all_gather(communicator: Communicator, vector: np.ndarray, name: str) -> np.ndarray:
    """Returns the vectors of all workers as rows, float64 ``(size, length)``, in one collective.

    ``vector`` has the same length on all workers.
    """
    rows = np.zeros((communicator.size, len(vector)))
    rows[communicator.rank] = vector
    return sums(communicator)(tf.constant(rows), name).numpy()


def sum_of_all(
    communicator: Communicator,
    own: Callable[[], np.ndarray],
    length: int,
    what: str,
) -> np.ndarray:
    """Returns the sum of what ``own`` returns on each worker, float64, in one collective.

    A worker on which ``own`` fails takes part too, as the others wait for it.

    Args:
        communicator: The communicator of the workers.
        own: Returns a vector of float64.
        length: The length of that vector, the same on all workers.
        what: The name of what must succeed.

    Raises:
        Exception: what ``own`` has raised on this worker, also where the collective fails then.
        RuntimeError: it has raised on another worker.
    """
    error, vector = None, np.zeros(length)
    try:
        vector = own()
    except Exception as own_error:
        error = own_error
    failed = np.zeros(communicator.size)
    failed[communicator.rank] = error is not None
    message = tf.constant(np.concatenate([failed, vector]))
    try:
        total = sums(communicator)(message, f"syncbn/{what}").numpy()
    except Exception as failure:
        if error is not None:
            raise error from failure
        raise
    if error is not None:
        raise error
    failed, total = np.split(total, [communicator.size])
    if failed.any():
        raise RuntimeError(
            f"{what} must succeed on all workers. Received: an error on rank "
            f"{', '.join(map(str, np.flatnonzero(failed)))}, which reports it."
        )
    return total


def gather_of_all(
    communicator: Communicator, own: Callable[[], np.ndarray], length: int, what: str
) -> np.ndarray:
    """Returns what ``own`` returns on each worker, as rows; see `sum_of_all`."""

    def row() -> np.ndarray:
        rows = np.zeros((communicator.size, length))
        rows[communicator.rank] = own()
        return rows.ravel()

    total = sum_of_all(communicator, row, communicator.size * length, what)
    return total.reshape(communicator.size, length)


def require_success(communicator: Communicator, action: Callable[[], None], what: str) -> None:
    """Raises on all workers where ``action`` fails on one of them; see `sum_of_all`."""

    def own() -> np.ndarray:
        action()
        return np.zeros(0)

    sum_of_all(communicator, own, 0, what)


def require_agreement(
    communicator: Communicator,
    descriptions: Sequence[str],
    names: Sequence[str],
    what: str,
    root: int = 0,
    remedy: str = "",
) -> None:
    """Raises where lists of descriptions differ between workers.

    Takes one small collective where they agree, and one more where they do not.

    Args:
        communicator: The communicator of the workers.
        descriptions: One for each of the things that should be the same.
        names: The names of these things, for the message; they may differ.
        what: What these things are, in the plural.
        root: The worker that the others are compared with.
        remedy: What else may help, a sentence for the message.

    Raises:
        ValueError: a worker's descriptions differ from those of ``root``. Raised on all workers,
            each of which says what it has at the first difference.
    """
    own = np.concatenate([[len(descriptions)], digest("\n".join(descriptions).encode())])
    rows = all_gather(communicator, own, "syncbn/agreement")
    differing = [rank for rank, row in enumerate(rows) if not np.array_equal(row, rows[root])]
    if not differing:
        return
    # All workers get here, as all have seen the same rows.
    count = int(rows[:, 0].max())
    digests = np.zeros((count, DIGEST_PARTS))
    for index, description in enumerate(descriptions):
        digests[index] = digest(description.encode())
    rows = all_gather(communicator, digests.ravel(), "syncbn/agreement/each")
    gathered = rows.reshape(communicator.size, count, DIGEST_PARTS)
    rank = communicator.rank
    other = rank if rank in differing else differing[0]
    first = int(np.argmax((gathered[other] != gathered[root]).any(axis=1)))
    here = f"{names[first]}, {descriptions[first]}" if first < len(names) else "missing"
    raise ValueError(
        f"All workers must have the same {what}. Received: different ones on rank "
        f"{', '.join(map(str, differing))} than on rank {root}. The first in which rank {other} "
        f"differs from rank {root} is number {first}; on this rank, {rank}, it is {here}. "
        f"Build the same model, from the same arguments, on every worker.{remedy and f' {remedy}'}"
    )


def digest(data: bytes) -> np.ndarray:
    """Returns the 16-bit parts of a SHA-256, each of which float64 represents exactly."""
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint16).astype(np.float64)
