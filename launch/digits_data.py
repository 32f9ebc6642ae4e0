"""The data of `train_digits`, and which part of it each process reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from digits_job import DigitsJob
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAINING_IMAGES, TEST_IMAGES = 1280, 512
"""Of 1797 images; five are left out, so that the usual batches divide both parts."""


class Split(NamedTuple):
    """Images ``(n, 8, 8, 1)`` in [0, 1] and digits ``(n,)``."""

    images: np.ndarray
    digits: np.ndarray


def load_data() -> tuple[Split, Split]:
    """Returns the training and the test data, the same at each call."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    sizes = {"train_size": TRAINING_IMAGES, "test_size": TEST_IMAGES}
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits, **sizes, stratify=digits, random_state=0
    )
    return Split(x_train, y_train), Split(x_test, y_test)


def training_batches(data: Split, batch: int, epochs: range, seed: int, job: DigitsJob) -> Any:
    """Returns this process's part of the batches of these epochs in a row, each reshuffled.

    The last, partial batch of an epoch is left out, as it may leave replicas without images.
    `SyncBatchNormalization` can do with that, but the plain layer of Keras 3 takes a mean over
    nothing, and its moving statistics are NaN from then on.
    """
    # Shuffled here, as Keras starts a dataset more often in one setup than in another; and in the
    # same way in every process, as each takes its part of the same batches.
    random, size = np.random.default_rng(seed), len(data.images)
    order = [random.permutation(size)[: size // batch * batch] for _ in range(epochs.stop)]
    own = np.concatenate(order[epochs.start :]).reshape(-1, batch)[:, job.rank :: job.processes]
    shuffled = Split(*(part[own.ravel()] for part in data))
    return _batches(shuffled, own.shape[1], job)


def test_batches(data: Split, job: DigitsJob) -> tuple[Any, int]:
    """Returns this process's part, repeated, and the number of batches in it.

    Keras 3 needs a first batch that divides evenly; a second one has what is left.
    """
    own = Split(*(part[job.rank :: job.processes] for part in data))
    left = len(own.images) % job.replicas_here
    return _batches(own, len(own.images) - left, job), 1 + bool(left)


def _batches(data: Split, size: int, job: DigitsJob) -> Any:
    """Returns batches for the replicas of this process together, without end."""
    dataset = tf.data.Dataset.from_tensor_slices(tuple(data))
    if job.strategy is None or job.processes == 1:
        return dataset.batch(size).repeat()
    # Given a dataset, a strategy would shard it between the workers. This is one worker's own part.
    of_replica = dataset.batch(size // job.replicas_here).repeat()
    return job.strategy.distribute_datasets_from_function(lambda context: of_replica)
