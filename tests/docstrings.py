"""The examples in docstrings, and the names that they may use."""

import doctest
import importlib
import io

import numpy as np
import tensorflow as tf

import syncbn

# Those that need two processes, which tests/launchers/test_documentation.py starts.
IN_A_JOB = {
    "horovod": ("syncbn.training.init_horovod", "syncbn.HorovodCommunicator"),
    "mpi": ("syncbn.MPICommunicator",),
}


def public(name):
    """The object of a name such as ``"syncbn.training.join"``."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def names_of_the_examples():
    """What the page of public names says that examples have."""
    layers = [tf.keras.layers.BatchNormalization(name="normalization"), tf.keras.layers.Dense(1)]
    model = tf.keras.Sequential([tf.keras.Input((4,)), *layers], name="classifier")
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).random([16, 4], "float32"), np.ones([16, 1], "float32")
    return {"np": np, "tf": tf, "syncbn": syncbn, "model": model, "x": x, "y": y}


def examples(name):
    """The examples of a public name."""
    names = names_of_the_examples()
    return doctest.DocTestParser().get_doctest(public(name).__doc__, names, name, None, None)


def run_examples(name):
    """Runs them, and returns how many there are."""
    test, said = examples(name), io.StringIO()
    results = doctest.DocTestRunner(verbose=False).run(test, out=said.write)
    assert results.failed == 0, said.getvalue()
    return results.attempted
