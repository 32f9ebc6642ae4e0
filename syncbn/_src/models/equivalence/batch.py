"""The batch that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.keras_compat import keras_api


def as_arrays(batch: Any) -> tuple[Any, ...]:
    """Returns ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, of arrays as `fit` makes them.

    Raises:
        TypeError: the batch is a dataset.
        ValueError: it is a tuple of more.
    """
    if isinstance(batch, tf.data.Dataset):
        raise TypeError(
            "`batch` must be the arrays of one batch. Received: a tf.data.Dataset. Give "
            "next(iter(dataset)), or more samples of it."
        )
    data = batch if isinstance(batch, tuple) else (batch,)
    if not 1 <= len(data) <= 3:
        raise ValueError(
            "`batch` must be x, (x, y) or (x, y, sample_weight); several inputs are a list. "
            f"Received: a tuple of {len(data)}."
        )
    while len(data) > 1 and data[-1] is None:
        data = data[:-1]
    floatx = keras_api.keras.backend.floatx()

    def array(value: Any) -> np.ndarray:
        value = np.asarray(value)
        return value.astype(floatx) if value.dtype == np.float64 else value

    return tf.nest.map_structure(array, data)


def number_of_samples(data: tuple[Any, ...]) -> int:
    """Returns the number of samples in each part of a batch."""
    lengths = [array.shape[:1] for array in tf.nest.flatten(data)]
    if not lengths or len(set(lengths)) > 1 or not lengths[0] or not lengths[0][0]:
        raise ValueError(
            "All parts of `batch` must have the same number of samples (first axis), at least one. "
            f"Received: {', '.join(str(a.shape) for a in tf.nest.flatten(data)) or 'nothing'}."
        )
    return lengths[0][0]


def shares(samples: int, replicas: int, split: Sequence[int] | None) -> list[int]:
    """Returns the number of samples for each replica."""
    if replicas < 2:
        raise ValueError(f"`replicas` must be 2 at least. Received: replicas={replicas}.")
    if split is None:
        if samples % replicas:
            raise ValueError(
                "The number of samples in `batch` must be a multiple of `replicas`, unless `split` "
                f"is given. Received: {samples} samples and replicas={replicas}."
            )
        return [samples // replicas] * replicas
    sizes = [int(size) for size in split]
    if len(sizes) != replicas or sum(sizes) != samples or min(sizes) < 0:
        raise ValueError(
            f"`split` must share {samples} samples among {replicas} replicas. "
            f"Received: split={tuple(split)}."
        )
    return sizes
