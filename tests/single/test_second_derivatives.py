"""A gradient penalty: the gradient of a gradient, against automatic differentiation in float64."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn


def penalty(normalize, x, gamma, weights):
    with tf.GradientTape() as outer:
        outer.watch([x, gamma])
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(weights * normalize(x) ** 3)
        loss = tf.reduce_sum(inner.gradient(loss, x) ** 2)
    return outer.gradient(loss, [x, gamma])


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 48, 48, 64)], ids=["plain", "fused"])
def test_batch_normalization(shape, graph):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, *shape))
    layer = syncbn.SyncBatchNormalization()
    layer.build(shape)

    def ours():
        gamma = layer.trainable_variables[0]
        with tf.GradientTape() as outer:
            wide = tf.constant(x, tf.float32)
            outer.watch(wide)
            with tf.GradientTape() as inner:
                inner.watch(wide)
                y = layer(wide, training=True)
                loss = tf.reduce_sum(tf.constant(weights, tf.float32) * y**3)
            loss = tf.reduce_sum(inner.gradient(loss, wide) ** 2)
        return outer.gradient(loss, [wide, gamma])

    gamma = tf.ones(shape[-1:], tf.float64)

    def normalize(x):
        mean, variance = tf.nn.moments(x, list(range(len(shape) - 1)))
        return gamma * (x - mean) / tf.sqrt(variance + 1e-3)

    truth = penalty(normalize, tf.constant(x), gamma, tf.constant(weights))
    for one, other in zip((tf.function(ours) if graph else ours)(), truth, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_what_a_mask_hides_stays_hidden(make, value):
    x = np.random.default_rng(0).normal(size=(6, 5, 3)).astype("float32")
    mask = np.random.default_rng(1).random((6, 5)) < 0.6
    poisoned = np.where(mask[..., None], x, np.float32(value))

    def second(x):
        layer, x = make(), tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True, mask=mask)
                loss = tf.reduce_sum(tf.boolean_mask(y, mask) ** 3)
            penalty = tf.reduce_sum(tf.boolean_mask(inner.gradient(loss, x), mask) ** 2)
        return outer.gradient(penalty, x).numpy()[mask]

    truth = second(x)
    np.testing.assert_allclose(second(poisoned), truth, atol=1e-5 * np.abs(truth).max())


def test_layers_of_many_shapes_one_after_the_other():
    for shape in [(5, 3, 4), (0, 3, 4), (5, 2304, 64), (0, 2304, 64), (5, 8, 8), (3, 2304, 32)]:
        layer, x = syncbn.SyncBatchNormalization(), tf.ones(shape)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        np.testing.assert_allclose(outer.gradient(penalty, x), np.zeros(shape), atol=1e-6)
