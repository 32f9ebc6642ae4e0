"""Trains a small convolutional network with batch normalization on handwritten digits.

One training run, and the demo, which compares plain and synchronized batch normalization:

    python launch/train_digits.py --norm sync --replicas 8 --batch-per-replica 2
    python launch/train_digits.py --compare --picture build/digits.png

The data, 8x8 images, come with scikit-learn: ``pip install 'syncbn[demo]'``.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# With oneDNN a convolution gives an empty batch the shape of its input, and the last test batch may
# leave a replica without images. It also changes the order of sums from one batch size to another.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from syncbn import SyncBatchNormalization

EARLY_STEPS = 20
"""Steps that are not timed, as they trace and warm up, and after which weights are compared."""


class Setup(NamedTuple):
    """What a run trains with: the layer, and how the batch is split."""

    norm: str
    replicas: int
    batch_per_replica: int

    @property
    def batch(self) -> int:
        """Images in a step, over all replicas."""
        return self.replicas * self.batch_per_replica

    def __str__(self) -> str:
        return f"{self.norm}, {self.replicas} x {self.batch_per_replica}"


class Split(NamedTuple):
    """Images ``(n, 8, 8, 1)`` in [0, 1] and digits ``(n,)``."""

    images: np.ndarray
    digits: np.ndarray


class Run(NamedTuple):
    """What came out of a run."""

    test_loss: np.ndarray
    """Cross-entropy after each epoch, in nats per image."""
    test_accuracy: np.ndarray
    """Share of the images, in percent, after each epoch."""
    step_ms: float
    early_weights: list[np.ndarray]


class StepRecorder(tf.keras.callbacks.Callback):
    """Times the steps, and keeps the weights after the first few."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.early_weights: list[np.ndarray] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.times.append(time.perf_counter() - self._start)
        if len(self.times) <= EARLY_STEPS:
            self.early_weights = self.model.get_weights()

    def median_ms(self) -> float:
        return 1e3 * float(np.median(self.times[EARLY_STEPS:] or np.nan))


def load_data() -> tuple[Split, Split]:
    """Returns the training and the test data, the same at each call."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    # Of 1797 images five are left out, so that the usual batches divide both parts.
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits, train_size=1280, test_size=512, stratify=digits, random_state=0
    )
    return Split(x_train, y_train), Split(x_test, y_test)


def training_batches(data: Split, batch: int, epochs: int, seed: int) -> tf.data.Dataset:
    """Returns the batches of all epochs in a row, each epoch shuffled anew.

    The last, partial batch of an epoch is left out. It would leave replicas without images, which
    `SyncBatchNormalization` does not mind, but Keras 3's own layer takes a mean over nothing: its
    moving statistics are NaN from then on.
    """
    # Shuffled here, as Keras starts a dataset more often in one setup than in another.
    random, whole = np.random.default_rng(seed), len(data.images) // batch * batch
    order = np.concatenate([random.permutation(len(data.images))[:whole] for _ in range(epochs)])
    return tf.data.Dataset.from_tensor_slices((data.images[order], data.digits[order])).batch(
        batch, drop_remainder=True
    )


def test_batches(data: Split, replicas: int) -> tf.data.Dataset:
    """Returns the test data in one batch, and in a second one what the replicas cannot share."""
    return tf.data.Dataset.from_tensor_slices(data).batch(len(data.images) // replicas * replicas)


def build_model(norm: str) -> tf.keras.Model:
    """Returns the network; its weights have the same shapes and order for each ``norm``."""
    layers = tf.keras.layers
    if norm == "sync":
        # The moving variance of Keras' own layer is unbiased in Keras 2, and biased in Keras 3.
        keras_2 = not hasattr(tf.keras, "Variable")
        normalization = functools.partial(SyncBatchNormalization, unbiased_moving_variance=keras_2)
    else:
        normalization = layers.BatchNormalization
    model = tf.keras.Sequential([tf.keras.Input((8, 8, 1))])
    for filters, strides in (16, 1), (32, 2), (64, 2):
        model.add(layers.Conv2D(filters, 3, strides, padding="same", use_bias=False))
        # An epoch is only 80 steps: the moving averages should not take longer than that.
        model.add(normalization(momentum=0.9))
        # Smooth, unlike ReLU: at a kink, a difference in the last digit may become a large one.
        model.add(layers.Activation("swish"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    return model


def initial_weights(seed: int) -> list[np.ndarray]:
    tf.keras.utils.set_random_seed(seed)
    return build_model("batch").get_weights()


def prepare_devices(replicas: int) -> None:
    """Makes sure that there is a device for each replica: a GPU, or else a part of the CPU."""
    if replicas == 1 or len(tf.config.list_physical_devices("GPU")) >= replicas:
        return
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    # Turns off autotuning: its threads, one for each replica, may take half a minute to stop
    # whenever an iterator over the data ends.
    tf.data.experimental.enable_debug_mode()


@functools.cache
def strategy_for(replicas: int) -> tf.distribute.Strategy:
    """Returns the strategy of all runs with so many replicas.

    One for all of them: a second one over the same devices would number its collectives from the
    start again, and TensorFlow takes them for those of the first.
    """
    if replicas == 1:
        return tf.distribute.get_strategy()
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(replicas)])


def train(
    setup: Setup,
    weights: list[np.ndarray],
    data: tuple[Split, Split],
    *,
    epochs: int,
    seed: int,
    learning_rate: float,
) -> Run:
    """Trains the network from ``weights``, on data in an order that depends on ``seed`` alone."""
    training, test = data
    with strategy_for(setup.replicas).scope():
        model = build_model(setup.norm)
        model.set_weights(weights)
        model.compile(
            tf.keras.optimizers.SGD(learning_rate, momentum=0.9),
            tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,  # or Keras would compile some setups with XLA and not others
        )
    recorder = StepRecorder()
    # The test uses the moving statistics. Those of plain batch normalization differ from replica
    # to replica: here, in Keras 3, each replica uses its own, and the model keeps the first's.
    history = model.fit(
        training_batches(training, setup.batch, epochs, seed),
        epochs=epochs,
        steps_per_epoch=len(training.images) // setup.batch,
        validation_data=test_batches(test, setup.replicas),
        shuffle=False,
        callbacks=[recorder],
    ).history
    return Run(
        np.array(history["val_loss"]),
        100 * np.array(history["val_accuracy"]),
        recorder.median_ms(),
        recorder.early_weights,
    )


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Returns the largest absolute difference between arrays of the same shapes."""
    return max(float(np.max(np.abs(x - y))) for x, y in zip(a, b, strict=True))


def print_table(results: dict[Setup, list[Run]], reference: Setup | None) -> None:
    """Prints a line for each setup; with a reference, also how far from it the others are."""
    row = "{:<14}  {:>16}  {:>17}  {:>7}  {:>11}  {:>11}".format
    compared = ("weights", "test loss") if reference else ("", "")
    print()
    print(row("norm, replicas", "test accuracy, %", "test loss, nats", "step,", *compared))
    print(row("x batch", "mean ± sd", "mean ± sd", "ms", *(["max |Δ|"] * 2 if reference else compared)))
    for setup, runs in results.items():
        distances = ["", ""]
        if reference:
            pairs = list(zip(runs, results[reference], strict=True))
            distances = [
                f"{max(difference(a.early_weights, b.early_weights) for a, b in pairs):.1e}",
                f"{max(difference([a.test_loss], [b.test_loss]) for a, b in pairs):.1e}",
            ]
        print(
            row(
                str(setup),
                _mean_and_deviation([run.test_accuracy[-1] for run in runs], 2),
                _mean_and_deviation([run.test_loss[-1] for run in runs], 4),
                f"{np.median([run.step_ms for run in runs]):.1f}",
                *(("reference", "") if setup == reference else distances),
            )
        )


def _mean_and_deviation(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
