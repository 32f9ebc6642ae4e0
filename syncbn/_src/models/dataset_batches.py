"""The batches of a dataset that a user gives, of whatever kind it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.arguments import at_least_one
from syncbn._src.keras_compat import keras_api


class DatasetBatches:
    """The batches of a dataset, and a progress bar over all passes."""

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        passes: int,
        verbose: int | str,
        name: str = "dataset",
    ) -> None:
        self._dataset, self._steps, self._passes, self._name = dataset, steps, passes, name
        self._verbose = verbose
        self._bar: Any = None
        self._seen = 0
        self._in_a_pass: int | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._bar is None:
            self._steps = self._checked_steps()
            target = None if self._steps is None else self._passes * self._steps
            self._bar = progress_bar(target, self._verbose, "batch")
        before = self._seen
        for batch in itertools.islice(_batches(self._dataset), self._steps):
            yield batch
            self._seen += 1
            self._bar.update(self._seen)
        taken = self._seen - before
        if self._in_a_pass not in (None, taken):
            raise ValueError(
                "`exact` goes through `dataset` several times, which must have the same batches "
                f"each time. Received: {self._in_a_pass} batches at first, and then {taken}."
            )
        self._in_a_pass = taken

    def end(self) -> None:
        """Ends the line of the progress bar."""
        end_line(self._bar, self._seen)

    def _checked_steps(self) -> int | None:
        """Returns how many batches a pass takes at most, where that is known."""
        dataset, steps = self._dataset, self._steps
        if steps is not None:
            steps = at_least_one("steps", steps, ", or None")
        if isinstance(dataset, np.ndarray | tf.Tensor) or not isinstance(dataset, Iterable):
            raise TypeError(
                f"`{self._name}` must be an iterable of batches, such as a tf.data.Dataset. "
                f"Received: {type(dataset).__name__}. For an array x, give "
                "tf.data.Dataset.from_tensor_slices(x).batch(32)."
            )
        if isinstance(dataset, tf.distribute.DistributedDataset):
            raise TypeError(
                f"`{self._name}` must be an ordinary one under tf.distribute too: each worker's "
                "own batches. Received: a DistributedDataset. Give what it was made from."
            )
        if self._passes > 1 and once_only(dataset):
            raise ValueError(
                f"`exact` goes through `dataset` {self._passes} times. Received: an iterator, "
                "which can be gone through once. Give a tf.data.Dataset, or a list of batches."
            )
        length = _cardinality(dataset)
        if steps is None and length == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "`dataset` must have an end. Received: one that repeats forever. Give `steps`."
            )
        return min((n for n in (length, steps) if n is not None and n >= 0), default=None)


def progress_bar(target: int | None, verbose: int | str, unit: str) -> Any:
    """Returns a progress bar of Keras; ``verbose`` may be ``"auto"``, as for `Model.fit`."""
    return keras_api.keras.utils.Progbar(
        target, verbose=1 if verbose == "auto" else verbose, unit_name=unit
    )


def end_line(bar: Any, seen: int) -> None:
    """Ends the line of a progress bar that has come to ``seen``."""
    if seen and seen != bar.target:
        bar.target = seen  # tf_keras cannot end a line without a target
        bar.update(seen, finalize=True)


# Also called PyDataset in Keras 3.
_Sequence: Any = keras_api.keras.utils.Sequence


def once_only(dataset: Any) -> bool:
    """Says whether a dataset can be gone through once only."""
    return isinstance(dataset, Iterator) and not isinstance(dataset, _Sequence)


def _batches(dataset: Any) -> Iterator[Any]:
    """Yields batches; the caller has to stop at the length of a sequence."""
    if not isinstance(dataset, _Sequence):
        yield from dataset
        return
    # By index, as Keras does: some sequences are iterators too, and may be in mid-iteration.
    for number in itertools.count():
        yield _standardized(dataset[number])


def _standardized(batch: Any) -> Any:
    """Returns a batch of a sequence as `predict_step` gets it from Keras 2 and 3."""
    if keras_api.KERAS_3:
        return (batch,) if isinstance(batch, np.ndarray) else batch
    utils = keras_api.keras.utils
    return utils.pack_x_y_sample_weight(*utils.unpack_x_y_sample_weight(batch))


def _cardinality(dataset: Any) -> int:
    """Returns the number of batches, or `tf.data`'s constant for an unknown or infinite one."""
    if isinstance(dataset, tf.data.Dataset):
        return int(dataset.cardinality())
    if keras_api.KERAS_3 and isinstance(dataset, _Sequence):
        number = dataset.num_batches
        return tf.data.INFINITE_CARDINALITY if number is None else number
    try:
        return len(dataset)
    except TypeError:
        return tf.data.UNKNOWN_CARDINALITY
