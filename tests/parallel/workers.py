"""What the tests of training in separate processes share. (A strategy has all of it built in.)"""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import KERAS_3, keras
from tests.kinds_of_replicas import Nested, Strategy
from tests.parallel.conftest import ENGINE

in_separate_processes = pytest.mark.skipif(
    ENGINE in ("mirrored", "multiworker"), reason="tf.distribute has this built in"
)

on_one_level = pytest.mark.skipif(
    "mirrored" in ENGINE or ENGINE == "multiworker", reason="one replica in each process"
)


def kept(values, *everywhere):
    """Values of parameters, marked but for those whose messages every engine has to carry."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else [value]),
            marks=[] if value in everywhere else pytest.mark.arithmetic,
        )
        for value in values
    ]


if KERAS_3:
    LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
else:
    LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer


class Counting:
    """Another communicator, and how often it was asked."""

    supports_jit = False

    def __init__(self, other):
        self._other, self.name, self.size, self.rank = other, other.name, other.size, other.rank
        self.calls = []

    def all_reduce_sum(self, tensor, name):
        self.calls.append(name)
        return self._other.all_reduce_sum(tensor, name)


def same_on_all_ranks(value):
    """Compares arrays over the ranks: their sum is ``size`` times each rank's own."""
    value = np.asarray(value, np.float64)
    communicator = syncbn.resolve()
    total = communicator.all_reduce_sum(tf.constant(value), "compare").numpy()
    squares = communicator.all_reduce_sum(tf.constant(value**2), "compare").numpy()
    np.testing.assert_allclose(total, communicator.size * value, rtol=1e-12)
    np.testing.assert_allclose(squares, communicator.size * value**2, rtol=1e-12)


def compiled(norm=None, **options):
    layers = [keras.Input((3,)), keras.layers.Dense(4), norm or syncbn.SyncBatchNormalization()]
    model = keras.Sequential([*layers, keras.layers.Dense(1, activation="sigmoid")])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(
        options.pop("optimizer", None) or training.distribute(optimizer),
        "binary_crossentropy",
        jit_compile=False,
        **options,
    )
    return model


def samples(count):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(count, 3)).astype("float32")
    return x, (x.sum(1, keepdims=True) > rng.normal(size=(count, 1))).astype("float32")


def across(replicas):
    """The communicator of the processes; that of one where a strategy has them all."""
    if isinstance(replicas, Nested):
        return replicas.process
    return syncbn.LocalCommunicator() if isinstance(replicas, Strategy) else replicas
