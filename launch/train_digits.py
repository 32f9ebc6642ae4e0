"""Trains a small convolutional network with batch normalization on handwritten digits.

The same script runs in one process, on several GPUs or logical CPU devices, and in every process of
a job that a launcher starts:

    python launch/train_digits.py --replicas 8 --batch-per-replica 2
    horovodrun --gloo -np 2 python launch/train_digits.py --checkpoint build/digits
    mpirun -np 2 python launch/train_digits.py
    python launch/multiworker.py --workers 2 -- python launch/train_digits.py

and as the demo, which compares plain and synchronized batch normalization:

    python launch/train_digits.py --compare --picture build/digits.png

The data, 8x8 images, come with scikit-learn: ``pip install 'syncbn[demo]'``.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
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
from digits_data import TRAINING_IMAGES, Split, load_data, test_batches, training_batches
from digits_job import ALONE, ENGINES, DigitsJob, require_same_arguments, start_replicas
from digits_report import Run, draw_digits, print_table

from syncbn import SyncBatchNormalization, training

EARLY_STEPS = 20
"""Steps that are not timed, as they trace and warm up, and after which weights are compared."""


class Setup(NamedTuple):
    """The setup of a run: the layer, and how the batch is split."""

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


class StepRecorder(tf.keras.callbacks.Callback):
    """Times the steps, and keeps the weights after the first few.

    Those that `PreemptionCheckpoint` skips, since they were made before, have no losses, and count
    for neither.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.early_weights: list[np.ndarray] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not logs or np.isnan([*map(float, logs.values())]).all():
            return
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) <= EARLY_STEPS:
            self.early_weights = self.model.get_weights()


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
        # The default, 0.99, averages over more steps than an epoch has.
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


class Schedule(NamedTuple):
    """How long and how fast a run learns, and what it leaves behind."""

    epochs: int
    learning_rate: float
    checkpoint: Path | None = None
    metrics: Path | None = None


def train(
    setup: Setup, data: tuple[Split, Split], job: DigitsJob, schedule: Schedule, seed: int
) -> Run:
    """Trains the network; initial weights and the order of the data depend on ``seed`` alone."""
    training_data, test = data
    weights = initial_weights(seed)
    steps, epochs = len(training_data.images) // setup.batch, schedule.epochs
    rate = tf.keras.optimizers.schedules.CosineDecay(schedule.learning_rate, epochs * steps)
    with job.scope():
        model = build_model(setup.norm)
        model.set_weights(weights)
        model.compile(
            training.distribute(
                tf.keras.optimizers.SGD(rate, momentum=0.9),
                "local" if job is ALONE else "auto",
            ),
            tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,  # or Keras would use XLA in some setups and not in others
        )
    recorder = StepRecorder()
    callbacks, first = [recorder], 0
    if job is not ALONE:
        # The test uses the moving statistics. Those of the plain layer differ from replica to
        # replica: each tests with its own, and the first one's are what a saved model gets.
        callbacks = [training.BroadcastVariables(), training.AverageMetrics(), recorder]
    checkpoints = []
    if schedule.checkpoint:
        checkpoints = [training.PreemptionCheckpoint(schedule.checkpoint)]
        first, _ = checkpoints[0].restore(model, model.optimizer)
        if first and job.rank == 0:
            print(f"Going on after epoch {first}, from {schedule.checkpoint}", flush=True)
        if first >= epochs:
            raise SystemExit(f"--epochs {epochs}: {schedule.checkpoint} has seen {first} of them.")
    if schedule.metrics and job.rank == 0:
        schedule.metrics.parent.mkdir(parents=True, exist_ok=True)
        callbacks.append(tf.keras.callbacks.CSVLogger(schedule.metrics, append=bool(first)))
    validation, validation_steps = test_batches(test, job)
    history = model.fit(
        training_batches(training_data, setup.batch, range(first, epochs), seed, job),
        initial_epoch=first,
        epochs=epochs,
        steps_per_epoch=steps,
        validation_data=validation,
        validation_steps=validation_steps,
        shuffle=False,
        callbacks=[*callbacks, *checkpoints],
        verbose=0 if job.rank else 1 if sys.stdout.isatty() and job.processes == 1 else 2,
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
    """Returns the arguments of the command line, checked as far as they can be by themselves."""
    parser = argparse.ArgumentParser(
        description="Trains a small convolutional network with batch normalization on handwritten "
        "digits (1280 images, tested on 512 others) and prints how well it does. Runs in one "
        "process, and in every process of a job that mpirun, horovodrun, launch/multiworker.py or "
        "the like starts."
    )
    count = integer_from(1)
    parser.add_argument(
        "--norm",
        choices=("batch", "sync"),
        default="sync",
        help="plain (tf.keras.layers.BatchNormalization) or synchronized "
        "(syncbn.SyncBatchNormalization); default: %(default)s",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="the engine that joins the replicas; default: that of the launcher (multiworker where "
        "it set TF_CONFIG, horovod under horovodrun --gloo, mpi under mpirun), mirrored without "
        "one. Horovod over MPI has to be named",
    )
    parser.add_argument(
        "--replicas",
        metavar="X",
        type=count,
        help="replicas of MirroredStrategy, on GPUs or all on the CPU; 1: no strategy; default: 8. "
        "A launcher's job has one in each process",
    )
    for flag, kind, default, text in (
        ("--batch-per-replica", count, 2, "images of a replica in each step"),
        ("--epochs", count, 8, "passes over the training images"),
        ("--learning-rate", rate, 0.02, "that of SGD, momentum 0.9; decays to zero along a cosine"),
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
        help="seeds for the initial weights and the order of the images; one run for each; "
        "default: 0",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train three times with each seed, whatever --norm says: plain and synchronized on "
        "all replicas, and as the reference plain on one replica with the whole batch",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        type=Path,
        help="where to save model and optimizer after each epoch, and after a signal (SIGTERM or "
        "SIGUSR1 to any process), before exiting with 75; goes on from what is there",
    )
    parser.add_argument(
        "--metrics", metavar="FILE.csv", type=Path, help="where to write the metrics of each epoch"
    )
    parser.add_argument(
        "--picture", metavar="FILE.png", type=Path, help="where to draw test loss and accuracy"
    )
    arguments = parser.parse_args()
    one_run = not arguments.compare and len(arguments.seeds) == 1
    for flag, value, suffix in (
        ("--checkpoint", arguments.checkpoint, ""),
        ("--metrics", arguments.metrics, ".csv"),
        ("--picture", arguments.picture, ".png"),
    ):
        if value and value.suffix != suffix and suffix:
            parser.error(f"{flag} must end in {suffix}. Received: {value}")
        if value and flag != "--picture" and not one_run:
            parser.error(f"{flag} is for one run, without --compare and with one seed")
    return arguments


def setups_of(arguments: argparse.Namespace, job: DigitsJob) -> tuple[list[Setup], Setup | None]:
    """Returns what to train with, and which of it is the reference.

    Raises:
        SystemExit: the job has more or fewer replicas than that takes.
    """
    replicas, share = job.replicas, arguments.batch_per_replica
    if replicas * share > TRAINING_IMAGES:
        raise SystemExit(
            f"A step of {replicas} replicas with --batch-per-replica {share} needs "
            f"{replicas * share} images. There are {TRAINING_IMAGES}."
        )
    if not arguments.compare:
        return [Setup(arguments.norm, replicas, share)], None
    if replicas == 1:
        raise SystemExit("--compare needs several replicas. Received: one.")
    reference = Setup("batch", 1, replicas * share)
    return [Setup(norm, replicas, share) for norm in ("batch", "sync")] + [reference], reference


def main() -> None:
    """Trains what the command line asks for, and reports."""
    arguments = parse_arguments()
    job = start_replicas(arguments.engine, arguments.replicas)
    files = ("checkpoint", "metrics", "picture")
    require_same_arguments(job, {k: v for k, v in vars(arguments).items() if k not in files})
    setups, reference = setups_of(arguments, job)
    say = functools.partial(print, flush=True) if job.rank == 0 else lambda *args: None
    say(f"Job: {job}")
    data = load_data()
    schedule = Schedule(
        arguments.epochs, arguments.learning_rate, arguments.checkpoint, arguments.metrics
    )
    results: dict[str, list[Run]] = {str(setup): [] for setup in setups}
    runs = [(seed, setup) for seed in arguments.seeds for setup in setups]
    for number, (seed, setup) in enumerate(runs, 1):
        say(f"\n[{number}/{len(runs)}] {setup}, seed {seed}")
        # The reference is trained by every process for itself.
        own_job = ALONE if setup.replicas == 1 else job
        results[str(setup)].append(train(setup, data, own_job, schedule, seed))
    if job.rank:
        return
    print_table(results, reference and str(reference), EARLY_STEPS)
    if arguments.picture:
        draw_digits(results, reference and str(reference), arguments.picture)
        print(f"\nPicture: {arguments.picture}")


if __name__ == "__main__":
    main()
