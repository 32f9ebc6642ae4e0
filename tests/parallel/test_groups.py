"""Groups that depend on the job: those of one machine, and those that make a batch of some size."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators import groups


def outputs(replicas, layer, batches):
    """Each replica's outputs for samples of its own, by rank; and all samples."""
    rng = np.random.default_rng(0)
    x = [rng.normal(rank, 1, size=(size, 3)) for rank, size in enumerate(batches)]
    layers = replicas.build(lambda rank: layer(), (None, 3))
    inputs = [(tf.constant(part, tf.float32),) for part in x]
    return replicas.run(lambda layer, x: layer(x, training=True), layers, inputs), x


def check(results, x, grouping):
    for rank, y in results.items():
        (members,) = [group for group in grouping if rank in group]
        mean = np.concatenate([x[member] for member in members]).mean(0)
        np.testing.assert_allclose(y, x[rank] - mean, atol=1e-5)


def test_replicas_of_one_machine_are_all_of_them_here(replicas):
    results, x = outputs(
        replicas, lambda: syncbn.SyncCentering(group_size="node"), [3] * replicas.size
    )
    check(results, x, [range(replicas.size)])


def test_replicas_of_two_machines(replicas, monkeypatch):
    if not replicas.separate:
        pytest.skip("a strategy knows the machines of its cluster, of which there is one here")
    # As if the first rank were alone on its machine.
    monkeypatch.setattr(groups.platform, "node", lambda: "one" if replicas.rank == 0 else "two")
    results, x = outputs(
        replicas, lambda: syncbn.SyncCentering(group_size="node"), range(1, replicas.size + 1)
    )
    check(results, x, [[0], range(1, replicas.size)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_group(value, replicas):
    x = np.random.default_rng(0).normal(size=(replicas.size, 4, 3)).astype("float32")
    x[-1, 0, 0] = value
    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(group_size=1), (None, 3))
    inputs = [(tf.constant(part),) for part in x]
    results = replicas.run(lambda layer, x: layer(x, training=True), layers, inputs)
    for rank, y in results.items():
        assert np.isfinite(y).all() == (rank != replicas.size - 1)


@pytest.mark.parametrize("target", [1, 1000])
def test_a_target_batch_is_met_by_all_replicas_alike(target, replicas):
    # Also where they have different batches, which those of a strategy must not.
    batches = list(range(2, 2 + replicas.size)) if replicas.separate else [3] * replicas.size
    results, x = outputs(replicas, lambda: syncbn.SyncCentering(target_batch=target), batches)
    ranks = range(replicas.size)
    check(results, x, [[rank] for rank in ranks] if target == 1 else [ranks])


def test_a_batch_that_one_replica_does_not_know_is_refused_by_all(replicas):
    def step(layer, x):
        known = None if replicas.separate and replicas.rank else 2
        signature = [tf.TensorSpec([known, 3])]
        call = lambda x: layer(x, training=True)  # noqa: E731
        return tf.function(call, input_signature=signature)(x)

    if not replicas.separate:
        pytest.skip("the replicas of a strategy run one function")
    layers = replicas.build(lambda rank: syncbn.SyncCentering(target_batch=2), (None, 3))
    with pytest.raises(ValueError, match="needs to know the batch"):
        replicas.run(step, layers, [(tf.ones([2, 3]),)] * replicas.size)


def test_recomputed_gradients_move_the_statistics_once(replicas):
    def step(layer, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.recompute_grad(lambda x: layer(x, training=True))(x)
        return tape.gradient(y, x)

    x = np.random.default_rng(0).normal(2, 1, size=(replicas.size, 4, 3))
    inputs = [(tf.constant(part, tf.float32),) for part in x]
    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(momentum=0.9), (None, 3))
    for graph in False, True:
        replicas.run(step, layers, inputs, graph=graph)
    mean = x.reshape(-1, 3).mean(0)
    for moved in replicas.moving(layers)["moving_mean"].values():
        np.testing.assert_allclose(moved, mean * (1 - 0.9**2), rtol=1e-5)
