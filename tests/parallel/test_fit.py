"""`Model.fit` on every engine: statistics of the whole batch, equal on all replicas."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import keras
from tests.kinds_of_replicas import Strategy
from tests.parallel.conftest import ENGINE

BATCH = 4  # per replica


@pytest.fixture
def fit(replicas):
    """Trains ``layer`` alone, and returns the model and what it has seen, batch by batch."""

    def run(make, samples, **options):
        strategy = isinstance(replicas, Strategy)
        scope = replicas.strategy.scope() if strategy else contextlib.nullcontext()
        with scope:
            model = keras.Sequential([keras.Input((3,)), make(), keras.layers.Dense(3)])
            # The weights stay: averaging gradients over workers is not this layer's business.
            model.compile(keras.optimizers.SGD(0.0), "mse", **options)
        rng = np.random.default_rng(2)
        x = rng.normal(2, 3, size=(samples, 3)).astype("float32")
        step = BATCH * replicas.size
        batches = [x[i : i + step] for i in range(0, samples, step)]
        own = x
        if not strategy:
            parts = [np.array_split(b, replicas.size)[replicas.rank] for b in batches]
            own = np.concatenate(parts)
            assert {len(p) for p in parts[:-1]} <= {BATCH}
        size = step if strategy else BATCH
        data = tf.data.Dataset.from_tensor_slices((own, own)).batch(size)
        policy = tf.data.Options()
        policy.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        if ENGINE == "multiworker":
            # Every worker reads its own part of each batch.
            rank = replicas.strategy.cluster_resolver.task_id
            own = np.concatenate([np.array_split(b, replicas.size)[rank] for b in batches])
            data = tf.data.Dataset.from_tensor_slices((own, own)).batch(BATCH).repeat()
            data = replicas.strategy.distribute_datasets_from_function(lambda _: data)
        else:
            data = data.with_options(policy)
        # Keras wants to be told how many steps a distributed dataset has.
        steps = len(batches) if ENGINE == "multiworker" else None
        model.fit(data, epochs=2, steps_per_epoch=steps, verbose=0, shuffle=False)
        return model, x, batches

    return run


def test_fit_learns_the_statistics_of_all_replicas(fit, replicas):
    # Under MirroredStrategy the last batch is smaller than the number of replicas, so some of them
    # get nothing. Workers that read their own data must have equally many batches.
    last = 1 if ENGINE == "mirrored" else replicas.size + 1
    samples = 3 * BATCH * replicas.size + last
    model, x, batches = fit(lambda: syncbn.SyncBatchNormalization(momentum=None), samples)
    layer = model.layers[0]
    weights = [len(b) for b in batches]
    variance = np.average([b.astype("float64").var(0) for b in batches], axis=0, weights=weights)
    _, _, mean, moving_variance, count = layer.get_weights()
    np.testing.assert_allclose(mean, x.astype("float64").mean(0), rtol=1e-5)
    np.testing.assert_allclose(moving_variance, variance, rtol=1e-5)
    np.testing.assert_array_equal(count, 2 * len(x))
    for values in replicas.moving([layer]).values():
        values = list(values.values())
        assert all(np.array_equal(values[0], value) for value in values), "differ on replicas"


def test_fit_on_fewer_samples_than_replicas(fit, replicas):
    if ENGINE != "mirrored":
        pytest.skip("here every worker reads its own part of a batch; only a strategy splits it")
    model, x, _ = fit(lambda: syncbn.SyncBatchNormalization(momentum=None), 1)
    np.testing.assert_allclose(model.layers[0].moving_mean, x[0], rtol=1e-6)
    np.testing.assert_array_equal(model.layers[0].moving_variance, [0, 0, 0])


def test_evaluate_and_predict_leave_the_statistics_alone(fit, replicas):
    model, x, _ = fit(syncbn.SyncCentering, 24 * replicas.size)
    before = model.get_weights()
    x = x[: 4 * replicas.size + 1]  # does not divide
    model.evaluate(x, x, verbose=0)
    outputs = model.predict(x, verbose=0)
    moving_mean, kernel = before[:2]
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_allclose(outputs, (x - moving_mean) @ kernel, rtol=1e-4, atol=1e-5)
