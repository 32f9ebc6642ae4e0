"""`compile_around_collectives`, which is of a whole process, so each test has its own."""

import pytest

from tests import processes

FLAGS = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"

BEGIN = """
import os, pathlib
import tensorflow as tf, syncbn
from syncbn.training import compile_around_collectives

def clusters():
    return len(list(pathlib.Path(os.environ["FOLDER"]).glob("*cluster_*.before_optimizations.txt")))

@tf.function
def wave(x):
    return tf.sin(x) * tf.exp(-x * x) + 2 * x
"""


def run(code, folder, **env):
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=cluster_"
    finished = processes.python(BEGIN + code, XLA_FLAGS=flags, FOLDER=str(folder), **env)
    assert finished.code == 0, finished.output


def test_one_call_at_the_start_is_enough(tmp_path):
    code = """
# What does not start TensorFlow may come before.
tf.keras.utils.set_random_seed(0)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
threads = tf.config.threading.get_inter_op_parallelism_threads()
compile_around_collectives()
compile_around_collectives()  # again is nothing new
assert tf.config.threading.get_inter_op_parallelism_threads() == threads
assert tf.config.optimizer.get_jit() == "autoclustering"
x = tf.ones([100, 100])
assert clusters() == 0
wave(x)
assert clusters() == 1
# Taken back, also for a function that has run.
tf.config.optimizer.set_jit(False)
wave(tf.ones([50, 50]))
assert clusters() == 1
"""
    run(code, tmp_path)


@pytest.mark.parametrize(
    "start",
    [
        "tf.ones([1])",
        "tf.keras.Sequential([tf.keras.Input((2,)), tf.keras.layers.Dense(3)])",
        "tf.distribute.MirroredStrategy(['CPU:0'])",
        "tf.data.Dataset.range(3)",
    ],
    ids=["operation", "model", "strategy", "dataset"],
)
def test_a_call_that_comes_too_late_is_an_error(start, tmp_path):
    code = f"""
{start}
for _ in range(2):
    try:
        compile_around_collectives()
    except RuntimeError as error:
        assert "before TensorFlow starts. Received: a call of" in str(error), error
        assert "{FLAGS}" in str(error), error
    else:
        raise AssertionError("no error")
assert tf.config.optimizer.get_jit() == ""
wave(tf.ones([100, 100]))
assert clusters() == 0
"""
    run(code, tmp_path)


def test_with_the_launchers_flags_it_is_never_too_late(tmp_path):
    code = """
wave(tf.ones([100, 100]))
assert clusters() == 1
compile_around_collectives()
"""
    run(code, tmp_path, TF_XLA_FLAGS=FLAGS)


def test_with_a_gpu_in_sight_it_may_come_at_any_time_and_is_for_the_gpu_alone(tmp_path):
    # There is none here: TensorFlow's answer is a stand-in.
    code = """
tf.ones([1])
tf.config.get_visible_devices = lambda kind: [kind] * (kind == "GPU")
compile_around_collectives()
assert tf.config.optimizer.get_jit() == "autoclustering"
wave(tf.ones([100, 100]))
assert clusters() == 0
"""
    run(code, tmp_path)


def test_fit_is_compiled_around_collectives(tmp_path):
    code = """
import numpy as np
compile_around_collectives()
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
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
text = "".join(p.read_text() for p in pathlib.Path(os.environ["FOLDER"]).glob("*.before_opt*.txt"))
assert " sine(" in text and " cosine(" in text, clusters()
"""
    run(code, tmp_path)
