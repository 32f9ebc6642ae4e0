"""One batch moves the statistics once, however often it is seen."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import KERAS_3, keras, with_renormalization

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
X = np.random.default_rng(0).normal(3, 2, size=(8, 4)).astype("float32")


def step(layer, call):
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(call(x) ** 3)
    return tape.gradient(loss, [x, *layer.trainable_variables])


@BOTH
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_recomputed_gradients_move_the_statistics_once(make, graph):
    layer = make(momentum=0.9)
    layer.build(X.shape)
    once = step(layer, lambda x: layer(x, training=True))
    moved = [weight.numpy() for weight in layer.non_trainable_variables]

    again = make(momentum=0.9)
    again.build(X.shape)

    def recomputed():
        return step(again, tf.recompute_grad(lambda x: again(x, training=True)))

    gradients = (tf.function(recomputed) if graph else recomputed)()
    for gradient, truth in zip(gradients, once, strict=True):
        np.testing.assert_allclose(gradient, truth, rtol=1e-5, atol=1e-5)
    for weight, truth in zip(again.non_trainable_variables, moved, strict=True):
        np.testing.assert_allclose(weight, truth, rtol=1e-6)
    # And the next batch moves them again.
    again(X, training=True)
    assert not np.allclose(again.moving_mean, moved[0])


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no rematerialization of its own")
def test_rematerialization_in_keras_moves_the_statistics_once():
    def trained():
        keras.utils.set_random_seed(0)
        layer = syncbn.SyncBatchNormalization(momentum=0.9)
        model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
        # In a graph Keras 3.15 gives TensorFlow keyword arguments, which that refuses.
        model.compile("sgd", "mse", run_eagerly=True)
        model.fit(X, X[:, :1], batch_size=8, epochs=1, verbose=0)
        return layer.moving_mean.numpy()

    plain = trained()
    with keras.RematScope(mode="full"):
        np.testing.assert_allclose(trained(), plain, rtol=1e-6)


@pytest.mark.skipif(not KERAS_3, reason="optimizers of Keras 2 do not accumulate gradients")
def test_accumulated_gradients_move_the_statistics_once_for_each_batch():
    layer = syncbn.SyncBatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
    # Two batches for one update of the weights.
    model.fit(np.concatenate([X, X]), np.zeros((16, 1)), batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(layer.moving_mean, X.mean(0) * (1 - 0.9**2), rtol=1e-5)


@BOTH
def test_a_call_can_leave_the_statistics_alone(make):
    layer = make()
    layer.build(X.shape)
    before = [weight.numpy() for weight in layer.non_trainable_variables]
    outputs = layer(X, training=True, update_moving_statistics=False)
    for weight, value in zip(layer.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    np.testing.assert_array_equal(outputs, layer(X, training=True))
    assert not np.array_equal(layer.moving_mean, before[0])


@with_renormalization
def test_renormalization_would_find_its_statistics_moved():
    layer = syncbn.SyncBatchNormalization(renorm=True)
    layer.build(X.shape)
    with pytest.raises(NotImplementedError, match=r"renorm=True.*update_moving_statistics=False"):
        step(layer, tf.recompute_grad(lambda x: layer(x, training=True)))

    def frozen(x):
        return layer(x, training=True, update_moving_statistics=False)

    once = step(layer, frozen)
    for gradient, truth in zip(step(layer, tf.recompute_grad(frozen)), once, strict=True):
        np.testing.assert_allclose(gradient, truth, rtol=1e-5, atol=1e-5)


def test_a_vectorized_loop_in_a_graph_would_lose_the_gradients_of_what_it_recomputes():
    layer, plain = syncbn.SyncBatchNormalization(), keras.layers.BatchNormalization()
    for one in layer, plain:
        one.build(X.shape)

    def loop(call, x):
        return tf.vectorized_map(call, tf.stack([x, x]))[0]  # of one item there is no loop

    def looped(one):
        def recomputed(x):
            return tf.recompute_grad(lambda x: one(x, training=True))(x)

        return lambda x: loop(recomputed, x)

    lost = tf.function(lambda: step(plain, looped(plain)))()
    assert not np.any(lost[1]), "TensorFlow gives plain layers' gradients now"
    with pytest.raises(NotImplementedError, match="loses the gradients of variables"):
        tf.function(lambda: step(layer, looped(layer)))()

    # What else is right.
    truth = step(layer, lambda x: layer(x, training=True))

    def recomputes_the_loop():
        return step(layer, tf.recompute_grad(lambda x: loop(lambda x: layer(x, training=True), x)))

    for found in step(layer, looped(layer)), tf.function(recomputes_the_loop)():
        for gradient, whole in zip(found, truth, strict=True):
            np.testing.assert_allclose(gradient, whole, rtol=1e-4, atol=1e-4)
    centering = syncbn.SyncCentering()
    tf.function(lambda: step(centering, looped(centering)))()
