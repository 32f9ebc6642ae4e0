"""A batch that is given once, in the cross-replica context of a strategy."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import keras

X = np.random.default_rng(0).normal(3, 2, size=(6, 4, 3)).astype("float32")

OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "groups": {"group_size": 2},
    "virtual": {"virtual_batch_size": 3},
    "asked for": {"communicator": "tf.distribute"},
    "local": {"communicator": "local"},
}


def train(layer, graph, steps=2):
    """The last outputs and gradients, and the weights."""

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        # Of weights, tf.distribute gives none outside of replicas.
        return y, tape.gradient(loss, x)

    function = tf.function(step) if graph else step
    for _ in range(steps):
        results = function(tf.constant(X))
    return [result.numpy() for result in results], layer.get_weights()


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("options", OPTIONS)
def test_its_statistics_are_its_own_and_all_copies_move_alike(mirrored, options, graph):
    kind, options = mirrored(3), OPTIONS[options]
    with kind.strategy.scope():
        layer = syncbn.SyncBatchNormalization(**options)
        layer.build(X.shape)
        results, weights = train(layer, graph)
    alone = syncbn.SyncBatchNormalization(**{**options, "communicator": "local"})
    alone.build(X.shape)
    expected, expected_weights = train(alone, graph)
    # A mean over three copies may round.
    for ours, theirs in zip(results + weights, expected + expected_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for copies in kind.moving([layer]).values():
        for value in copies.values():
            np.testing.assert_array_equal(value, copies[0])
            assert np.abs(value).max() > 0


def test_it_is_that_of_the_plain_layer(mirrored):
    with mirrored(2).strategy.scope():
        ours, plain = syncbn.SyncBatchNormalization(), keras.layers.BatchNormalization()
        model = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(3), ours])
        x = model.layers[0](X)
        np.testing.assert_allclose(
            model(X, training=True), plain(x, training=True), rtol=1e-4, atol=1e-5
        )
        centered = syncbn.SyncCentering()(X, training=True)
    np.testing.assert_allclose(ours.moving_mean, plain.moving_mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(centered, X - X.mean((0, 1)), atol=1e-5)


def test_replicas_go_on_from_there(mirrored):
    kind = mirrored(2)
    with kind.strategy.scope():
        layer = syncbn.SyncCentering(momentum=0.5)
        layer(X, training=True)
    inputs = [(tf.constant(X[:1]),), (tf.constant(X[1:]),)]
    kind.run(lambda layer, x: layer(x, training=True), [layer], inputs)
    for values in kind.moving([layer]).values():
        for value in values.values():
            np.testing.assert_allclose(value, 0.75 * X.mean((0, 1)), rtol=1e-5)
