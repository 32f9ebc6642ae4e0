"""What users of other packages have reported, where replicas are real; see docs/user-reports.md."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import oracle


def step(layer, x, dy):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    return y, tape.gradient(y, [x, layer.gamma], output_gradients=dy)


def test_replicas_may_have_images_of_different_sizes(replicas):
    """pytorch#22192: one GPU has 300 x 300, the other 500 x 500."""
    rng = np.random.default_rng(0)
    sizes = [(2, 3 + 2 * rank, 5 + rank, 4) for rank in range(replicas.size)]
    x, dy = ([rng.normal(rank, 1, s) for rank, s in enumerate(sizes)] for _ in range(2))
    rows = [np.concatenate([part.reshape(-1, 4) for part in parts]) for parts in (x, dy)]
    truth = oracle.batch_normalization(*rows, np.ones(4), np.zeros(4))
    ends = np.cumsum([part.size // 4 for part in x])[:-1]

    layers = replicas.build(
        lambda rank: syncbn.SyncBatchNormalization(momentum=0.0), (None, None, None, 4)
    )
    inputs = [tuple(tf.constant(v[rank], tf.float32) for v in (x, dy)) for rank in range(len(x))]
    for rank, (y, (dx, _)) in replicas.run(step, layers, inputs).items():
        for ours, whole in (y, truth.y), (dx, truth.dx):
            own = np.split(whole, ends)[rank]
            np.testing.assert_allclose(ours.reshape(-1, 4), own, atol=1e-5 * np.abs(whole).max())
    moving = replicas.moving(layers)
    for name, value in ("moving_mean", truth.mean), ("moving_variance", truth.variance):
        for ours in moving[name].values():
            np.testing.assert_allclose(ours, value.reshape(-1), rtol=1e-5)


def test_a_large_loss_scale_overflows_nothing_in_float16(replicas):
    """apex#953: the loss scale fell until it was zero."""
    shape = (replicas.size, 32, 8, 8, 3)
    x, dy = np.random.default_rng(0).normal(3, 2, (2, *shape)).astype("float16")
    dy *= np.float16(2**12)  # nearly the largest float16
    wide = [v.astype("float64").reshape(-1, *shape[2:]) for v in (x, dy)]
    truth = oracle.batch_normalization(*wide, np.ones(3), np.zeros(3))
    products = (wide[1] * truth.normalized).reshape(shape)
    layers = replicas.build(
        lambda rank: syncbn.SyncBatchNormalization(dtype="mixed_float16"), (None, *shape[2:])
    )
    inputs = [(tf.constant(x[rank]), tf.constant(dy[rank])) for rank in range(replicas.size)]
    for rank, (_, (dx, dgamma)) in replicas.run(step, layers, inputs).items():
        own = truth.dx.reshape(shape)[rank]
        np.testing.assert_allclose(dx, own, atol=2e-3 * np.abs(truth.dx).max())
        share = products[rank].sum((0, 1, 2))
        assert np.abs(share).max() > np.finfo("float16").max
        np.testing.assert_allclose(dgamma, share, atol=1e-5 * np.abs(products).sum())


def test_a_training_call_in_a_branch_works_or_is_refused(replicas):
    """tf-keras#301: "merge_call called while defining a new graph"."""

    def branch(layer, x):
        return tf.cond(tf.reduce_all(x > -100), lambda: layer(x, training=True), lambda: x)

    x = np.random.default_rng(0).normal(size=(replicas.size, 4, 3))
    inputs = [(tf.constant(part, tf.float32),) for part in x]
    layers = replicas.build(lambda rank: syncbn.SyncCentering(), (None, 3))
    if not replicas.separate:
        with pytest.raises(RuntimeError, match="`merge_call` called while defining a new graph"):
            replicas.run(branch, layers, inputs, graph=True)
        return
    for rank, y in replicas.run(branch, layers, inputs, graph=True).items():
        np.testing.assert_allclose(y, x[rank] - x.mean((0, 1)), atol=1e-5)


def test_a_head_that_a_replica_does_not_use_takes_part_with_weight_zero(replicas):
    """mmdetection#933: the others wait for its gradient."""
    x = np.random.default_rng(0).normal(size=(replicas.size, 4, 3))
    used = np.arange(replicas.size) > 0
    whole = x.reshape(-1, 3)
    ones, zeros = np.ones(3), np.zeros(3)
    y = oracle.batch_normalization(whole, np.zeros_like(whole), ones, zeros).y
    dy = 3 * y**2 * np.repeat(used, 4)[:, None]
    truth = oracle.batch_normalization(whole, dy, ones, zeros).dx.reshape(x.shape)

    def head(layer, x, used):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = used * tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, x)

    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(), (None, 3))
    inputs = [
        (tf.constant(part, tf.float32), tf.constant(use, tf.float32))
        for part, use in zip(x, used, strict=True)
    ]
    for graph in False, True:
        for rank, dx in replicas.run(head, layers, inputs, graph=graph).items():
            np.testing.assert_allclose(dx, truth[rank], atol=1e-5 * np.abs(truth).max())
