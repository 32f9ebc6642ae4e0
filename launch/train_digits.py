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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# With oneDNN, a convolution on the CPU gives an empty batch the shape of its input, and the last
# test batch may leave a replica without images.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf
from digits_report import Run, draw, print_table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from syncbn import SyncBatchNormalization

TRAINING_IMAGES, TEST_IMAGES = 1280, 512
"""Of 1797 images; five are left out, so that the usual batches divide both parts."""
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
        layer = {"batch": "plain", "sync": "synchronized"}[self.norm]
        plural = "s" if self.replicas > 1 else ""
        return f"{layer}, {self.replicas} replica{plural} x {self.batch_per_replica}"


class Split(NamedTuple):
    """Images ``(n, 8, 8, 1)`` in [0, 1] and digits ``(n,)``."""

    images: np.ndarray
    digits: np.ndarray


class StepRecorder(tf.keras.callbacks.Callback):
    """Times the steps, and keeps the weights after the first few."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.early_weights: list[np.ndarray] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) <= EARLY_STEPS:
            self.early_weights = self.model.get_weights()


def load_data() -> tuple[Split, Split]:
    """Returns the training and the test data, the same at each call."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    sizes = {"train_size": TRAINING_IMAGES, "test_size": TEST_IMAGES}
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits, **sizes, stratify=digits, random_state=0
    )
    return Split(x_train, y_train), Split(x_test, y_test)


def training_batches(data: Split, batch: int, epochs: int, seed: int) -> tf.data.Dataset:
    """Returns the batches of all epochs in a row, each epoch shuffled anew.

    The last, partial batch of an epoch is left out, as it may leave replicas without images.
    `SyncBatchNormalization` does not mind, but the plain layer of Keras 3 takes a mean over
    nothing, and its moving statistics are NaN from then on.
    """
    # Shuffled here, as Keras starts a dataset more often in one setup than in another.
    random, size = np.random.default_rng(seed), len(data.images)
    order = [random.permutation(size)[: size // batch * batch] for _ in range(epochs)]
    shuffled = Split(*(part[np.concatenate(order)] for part in data))
    return tf.data.Dataset.from_tensor_slices(tuple(shuffled)).batch(batch, drop_remainder=True)


def test_batches(data: Split, replicas: int) -> tf.data.Dataset:
    """Returns one batch that the replicas can share evenly, and a second one with what is left."""
    even = len(data.images) // replicas * replicas
    return tf.data.Dataset.from_tensor_slices(tuple(data)).batch(even)


def build_model(norm: str) -> tf.keras.Model:
    """Returns the network; its weights have the same shapes and order for each ``norm``."""
    layers = tf.keras.layers
    if norm == "sync":
        # The moving variance of the plain layer is unbiased in Keras 2, and biased in Keras 3.
        keras_2 = not hasattr(tf.keras, "Variable")
        normalization = functools.partial(SyncBatchNormalization, unbiased_moving_variance=keras_2)
    else:
        normalization = layers.BatchNormalization
    model = tf.keras.Sequential([tf.keras.Input((8, 8, 1))])
    # 8 pixels, then 4, 2 and 1: where two images are all that a replica has, its last statistics
    # are those of two numbers per channel.
    for filters in 16, 32, 64:
        model.add(layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
        # The default, 0.99, looks back on more steps than an epoch has.
        model.add(normalization(momentum=0.9))
        # Smooth, unlike ReLU: at a kink, a difference in the last digit can grow to a large one.
        model.add(layers.Activation("swish"))
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    return model


def initial_weights(seed: int) -> list[np.ndarray]:
    """Returns weights to start from, for a model with either layer."""
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
    # Turns off the tuning of data pipelines. It has a thread for each replica, and stopping these,
    # wherever an epoch or a test ends, was seen to take 20 s.
    tf.data.experimental.enable_debug_mode()


@functools.cache
def strategy_for(replicas: int) -> tf.distribute.Strategy:
    """Returns the strategy of all runs with so many replicas.

    One for all: a second strategy over the same devices would number its collectives from the
    start again, and TensorFlow would take them for those of the first.
    """
    if replicas == 1:
        return tf.distribute.get_strategy()
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(replicas)])


def train(
    setup: Setup,
    data: tuple[Split, Split],
    *,
    epochs: int,
    seed: int,
    learning_rate: float,
) -> Run:
    """Trains the network; initial weights and the order of the data depend on ``seed`` alone."""
    training, test = data
    weights = initial_weights(seed)
    steps = len(training.images) // setup.batch
    with strategy_for(setup.replicas).scope():
        model = build_model(setup.norm)
        model.set_weights(weights)
        model.compile(
            tf.keras.optimizers.SGD(
                tf.keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps),
                momentum=0.9,
            ),
            tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,  # or Keras would use XLA in some setups and not in others
        )
    recorder = StepRecorder()
    # The test uses the moving statistics. Those of the plain layer differ from replica to replica:
    # in Keras 3 each replica tests with its own, and the first one's are what a saved model gets.
    history = model.fit(
        training_batches(training, setup.batch, epochs, seed),
        epochs=epochs,
        steps_per_epoch=steps,
        validation_data=test_batches(test, setup.replicas),
        shuffle=False,
        callbacks=[recorder],
    ).history
    timed = recorder.seconds[EARLY_STEPS:]
    return Run(
        test_loss=np.array(history["val_loss"]),
        test_accuracy=100 * np.array(history["val_accuracy"]),
        step_ms=1e3 * float(np.median(timed)) if timed else float("nan"),
        early_weights=recorder.early_weights,
    )


def integer_from(minimum: int) -> Callable[[str], int]:
    """Returns a parser of integers that are not below ``minimum``."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}. Received: {text}")
        return int(text)

    return integer


def rate(text: str) -> float:
    """Parses a positive number."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite. Received: {text}")
    return float(text)


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of the command line, checked."""
    parser = argparse.ArgumentParser(
        description="Trains a small convolutional network with batch normalization on handwritten "
        "digits (1280 images, tested on 512 others) and prints how well it does."
    )
    count = integer_from(1)
    parser.add_argument(
        "--norm",
        choices=("batch", "sync"),
        default="sync",
        help="plain (tf.keras.layers.BatchNormalization) or synchronized "
        "(syncbn.SyncBatchNormalization); default: %(default)s",
    )
    for flag, kind, default, text in (
        ("--replicas", count, 8, "of MirroredStrategy, on GPUs or all on the CPU; 1: no strategy"),
        ("--batch-per-replica", count, 2, "images in each step of a replica"),
        ("--epochs", count, 8, "passes over the training images"),
        ("--learning-rate", rate, 0.02, "of SGD, momentum 0.9; falls to zero along a cosine"),
    ):
        parser.add_argument(
            flag, metavar="X", type=kind, default=default, help=f"{text}; default: %(default)s"
        )
    parser.add_argument(
        "--seeds",
        metavar="SEED",
        type=integer_from(0),
        nargs="+",
        default=[0],
        help="what initial weights and the order of the images depend on; one run for each seed; "
        "default: 0",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train three times with each seed, whatever --norm says: plain and synchronized on "
        "all replicas, and as the reference plain on one replica with the whole batch",
    )
    parser.add_argument(
        "--picture", metavar="FILE.png", type=Path, help="where to draw test loss and accuracy"
    )
    arguments = parser.parse_args()
    batch, images = arguments.replicas * arguments.batch_per_replica, TRAINING_IMAGES
    if batch > images:
        parser.error(f"a step of all replicas needs {batch} images. There are {images}")
    if arguments.compare and arguments.replicas == 1:
        parser.error("--compare needs several replicas. Received: --replicas 1")
    if arguments.picture and arguments.picture.suffix != ".png":
        parser.error(f"--picture must end in .png. Received: {arguments.picture}")
    return arguments


def main() -> None:
    """Trains what the command line asks for, and reports."""
    arguments = parse_arguments()
    replicas, share = arguments.replicas, arguments.batch_per_replica
    setups, reference = [Setup(arguments.norm, replicas, share)], None
    if arguments.compare:
        reference = Setup("batch", 1, replicas * share)
        setups = [Setup("batch", replicas, share), Setup("sync", replicas, share), reference]
    prepare_devices(replicas)
    data = load_data()
    results: dict[str, list[Run]] = {str(setup): [] for setup in setups}
    runs = [(seed, setup) for seed in arguments.seeds for setup in setups]
    for number, (seed, setup) in enumerate(runs, 1):
        print(f"\n[{number}/{len(runs)}] {setup}, seed {seed}", flush=True)
        run = train(
            setup, data, epochs=arguments.epochs, seed=seed, learning_rate=arguments.learning_rate
        )
        results[str(setup)].append(run)
    print_table(results, reference and str(reference), EARLY_STEPS)
    if arguments.picture:
        draw(results, reference and str(reference), arguments.picture)
        print(f"\nPicture: {arguments.picture}")


if __name__ == "__main__":
    main()
