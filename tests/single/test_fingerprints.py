"""Sums that say of which call they are: what a communicator of one's own is given and finds."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators import fingerprints
from syncbn._src.training.gradient_averages import average_gradients
from tests.kinds_of_replicas import Threads


class Twins:
    """Two replicas with the same batch each."""

    name, size, rank, supports_jit = "local", 2, 0, True

    def __init__(self):
        self.calls = []

    def all_reduce_sum(self, tensor, name):
        self.calls.append((name, tensor.shape.num_elements()))
        return 2 * tensor


class Strangers(Twins):
    """Two replicas, of which the other one makes another call."""

    def all_reduce_sum(self, tensor, name):
        own = tf.one_hot(tensor.shape[0] - fingerprints.LENGTH + 1, tensor.shape[0])
        return 2 * tensor + tf.cast(own, tensor.dtype)


def test_replicas_whose_layers_differ_are_all_told_of_both_sides():
    replicas = Threads(2)
    layers = [
        syncbn.SyncCentering(name=name, communicator=replicas.communicator(rank))
        for rank, name in enumerate(["one", "other"])
    ]
    told = []

    def step(layer, x):
        try:
            layer(x, training=True)
        except RuntimeError as error:
            told.append(str(error))
        return x

    replicas.run(step, layers, [(tf.ones([2, 3]),)] * 2)
    calls = ["syncbn/one/statistics, float64 (4,)", "syncbn/other/statistics, float64 (4,)"]
    for here, there in calls, calls[::-1]:
        assert sum(f"{here} here, and {there} on 1 of 2 replicas" in one for one in told) == 1


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_call_that_is_not_known_here_is_an_error_and_moves_nothing(graph):
    layer = syncbn.SyncBatchNormalization(communicator=Strangers(), momentum=0.0)
    layer.build((None, 3))

    def step():
        layer(tf.ones([2, 3]), training=True)

    errors = (RuntimeError, tf.errors.UnknownError)
    with pytest.raises(errors, match="this process has not made on others of 2 replicas"):
        (tf.function(step) if graph else step)()
    np.testing.assert_array_equal(layer.moving_mean, [0, 0, 0])


def test_xla_which_knows_no_errors_makes_nans():
    def outputs(communicator):
        layer = syncbn.SyncBatchNormalization(communicator=communicator)
        layer.build((None, 3))
        return tf.function(lambda x: layer(x, training=True), jit_compile=True)(x).numpy()

    x = tf.constant(np.random.default_rng(0).normal(size=(4, 3)), tf.float32)
    assert np.isfinite(outputs(Twins())).all()
    assert np.isnan(outputs(Strangers())).all()


def test_a_call_of_many_is_known_by_the_sums():
    for name in "abcd":
        fingerprints.fingerprinted(lambda one: one, tf.ones([2]), name)
    marks = {
        name: np.array([*fingerprints._checksum(f"{name}, float32 (2,)"), 0, 0, 0, 0], float)
        for name in "abcd"
    }
    for others in 1, 3, 999:
        total = (1000 - others) * marks["a"] + others * marks["b"]
        known = f"b, float32 (2,) on {others} of 1000 replicas"
        assert fingerprints._others(1000, total, marks["a"]) == known
    total = sum(marks.values())
    assert "has not made" in fingerprints._others(4, total, marks["a"])
    for replicas, garbage in (4.5, total), (4, np.full(8, np.nan)), (0, np.zeros(8)):
        said = fingerprints._others(replicas, garbage, marks["a"])
        assert "no call of a synchronized layer" in said


def test_calls_of_one_layer_have_names_of_their_own_which_their_gradients_take():
    communicator = Twins()
    layer = syncbn.SyncBatchNormalization(communicator=communicator, name="norm")
    layer.build((None, 3))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            first, second = layer(x, training=True), layer(2 * x, training=True)
            loss = tf.reduce_sum(tf.stop_gradient(first) * second**3)
        return tape.gradient(loss, x)

    step(tf.ones([4, 3]))
    assert communicator.calls == [
        ("syncbn/norm/statistics", 7 + fingerprints.LENGTH),
        ("syncbn/norm/call_2/statistics", 7 + fingerprints.LENGTH),
        ("syncbn/norm/call_2/gradient", 6 + fingerprints.LENGTH),
    ]


def test_eagerly_gradients_are_told_apart_by_their_calls():
    communicator = Twins()
    layer = syncbn.SyncBatchNormalization(communicator=communicator, name="norm")
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 3)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) ** 3 + layer(2 * x, training=True) ** 3)
    tape.gradient(loss, x)
    names = [name for name, _ in communicator.calls]
    assert names[:2] == ["syncbn/norm/statistics"] * 2
    assert all(name.startswith("syncbn/norm/gradient>") for name in names[2:])
    assert len(set(names)) == 3


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_are_right_in_each_dtype(dtype):
    gradients = [tf.constant([1.5, -2.0], dtype), tf.constant([[3.0]], dtype)]
    averages = average_gradients(gradients, Twins(), "gradients")
    for average, gradient in zip(averages, gradients, strict=True):
        np.testing.assert_array_equal(average, gradient)
    with pytest.raises(RuntimeError, match=r"gradients/float\d\d/.* here, and calls that this"):
        average_gradients(gradients, Strangers(), "gradients")
