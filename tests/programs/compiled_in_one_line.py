"""Jobs that call `compile_around_collectives`; the first argument names which, a function below.

``FOLDER`` is where XLA puts what it has compiled. The second argument of some is TensorFlow's
flags of the launchers, or what has started TensorFlow too early.
"""

import os
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn.training import compile_around_collectives

STARTS = {
    "operation": lambda: tf.ones([1]),
    "model": lambda: tf.keras.Sequential([tf.keras.Input((2,)), tf.keras.layers.Dense(3)]),
    "strategy": lambda: tf.distribute.MirroredStrategy(["CPU:0"]),
    "dataset": lambda: tf.data.Dataset.range(3),
}


def clusters():
    folder = pathlib.Path(os.environ["FOLDER"])
    return list(folder.glob("*cluster_*.before_optimizations.txt"))


@tf.function
def wave(x):
    return tf.sin(x) * tf.exp(-x * x) + 2 * x


def split_the_cpu():
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


def at_the_start():
    # What does not start TensorFlow may come before.
    tf.keras.utils.set_random_seed(0)
    split_the_cpu()
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    compile_around_collectives()
    compile_around_collectives()  # again is nothing new
    assert tf.config.threading.get_inter_op_parallelism_threads() == threads
    assert tf.config.optimizer.get_jit() == "autoclustering"
    x = tf.ones([100, 100])
    assert len(clusters()) == 0
    wave(x)
    assert len(clusters()) == 1
    # Taken back, also for a function that has run.
    tf.config.optimizer.set_jit(False)
    wave(tf.ones([50, 50]))
    assert len(clusters()) == 1


def too_late(flags, start):
    STARTS[start]()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"before TensorFlow starts\. Received: a") as error:
            compile_around_collectives()
        assert flags in str(error.value)
    assert tf.config.optimizer.get_jit() == ""
    wave(tf.ones([100, 100]))
    assert len(clusters()) == 0


def with_the_flags():
    wave(tf.ones([100, 100]))
    assert len(clusters()) == 1
    compile_around_collectives()


def with_a_gpu_in_sight():
    # There is none here: TensorFlow's answer is a stand-in.
    tf.ones([1])
    tf.config.get_visible_devices = lambda kind: [kind] * (kind == "GPU")
    compile_around_collectives()
    assert tf.config.optimizer.get_jit() == "autoclustering"
    wave(tf.ones([100, 100]))
    assert len(clusters()) == 0


def fit():
    compile_around_collectives()
    split_the_cpu()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        normalization = syncbn.SyncBatchNormalization(momentum=0.0)
        dense = tf.keras.layers.Dense(8)
        wave = tf.keras.layers.Lambda(lambda h: tf.sin(h) * tf.exp(-tf.square(h)) + tf.cos(h) * h)
        layers = [dense, wave, normalization, tf.keras.layers.Dense(1)]
        model = tf.keras.Sequential([tf.keras.Input((4,)), *layers])
        model.compile(tf.keras.optimizers.SGD(0.0), "mse")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0, shuffle=False)
    h = x.astype("float64") @ dense.kernel.numpy().astype("float64")
    hidden = np.sin(h) * np.exp(-np.square(h)) + np.cos(h) * h
    np.testing.assert_allclose(normalization.moving_mean, hidden.mean(0), atol=1e-6)
    np.testing.assert_allclose(normalization.moving_variance, hidden.var(0), rtol=1e-5)
    text = "".join(path.read_text() for path in clusters())
    assert " sine(" in text, clusters()
    assert " cosine(" in text, clusters()


globals()[sys.argv[1]](*sys.argv[2:])
