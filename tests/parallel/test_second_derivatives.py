"""Gradient penalties on every engine, against automatic differentiation of the whole batch."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn


def penalty_gradient(call, x, weights):
    """d/dx of the sum of squares of d/dx of a loss."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(weights * call(x) ** 3)
        penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
    return outer.gradient(penalty, x)


def by_part(call, x, weights, parts):
    """`penalty_gradient` of each part by itself."""
    return np.concatenate(
        [
            penalty_gradient(call, tf.constant(x[part]), tf.constant(weights[part])).numpy()
            for part in parts
            if len(part)
        ]
    )


def normalize(x):
    mean, variance = tf.nn.moments(x, [0, 1])
    return (x - mean) / tf.sqrt(variance + 1e-3)


def center(x):
    return x - tf.reduce_mean(x, [0, 1])


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("layer", "plain", "sample", "options"),
    [
        ("SyncBatchNormalization", normalize, (3, 4), {}),
        ("SyncBatchNormalization", normalize, (3, 4), {"group_size": 1}),
        # For the fused and compiled kernels.
        pytest.param(
            *("SyncBatchNormalization", normalize, (2304, 64), {}), marks=pytest.mark.arithmetic
        ),
        ("SyncCentering", center, (3, 4), {}),
        ("SyncCentering", center, (3, 4), {"group_size": 1}),
    ],
)
def test_the_penalty_of_replicas_is_that_of_the_whole_batch(
    replicas, layer, plain, sample, options, graph
):
    # One replica has nothing, and takes part nevertheless.
    sizes = [0, 5, *(1 + rank for rank in range(replicas.size))][: replicas.size]
    x, weights = np.random.default_rng(6).normal(size=(2, sum(sizes), *sample))
    parts = np.split(np.arange(len(x)), np.cumsum(sizes)[:-1])
    truth = by_part(plain, x, weights, parts if options else [np.arange(len(x))])
    arguments = [
        (tf.constant(x[part], tf.float32), tf.constant(weights[part], tf.float32)) for part in parts
    ]
    layers = replicas.build(lambda rank: getattr(syncbn, layer)(**options), (None, *sample))

    def step(layer, x, weights):
        return penalty_gradient(lambda x: layer(x, training=True), x, weights)

    for rank, actual in replicas.run(step, layers, arguments, graph=graph).items():
        scale = np.abs(truth).max()
        np.testing.assert_allclose(actual / scale, truth[parts[rank]] / scale, atol=2e-5)
