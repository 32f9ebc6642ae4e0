"""`moving_statistics` and `set_moving_statistics`."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import keras


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [syncbn.SyncCentering(name="center"), keras.layers.BatchNormalization()]

    def build(self, shape):
        for part in self.parts:
            part.build(shape)
        super().build(shape)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.fixture
def model():
    shared = syncbn.SyncBatchNormalization(name="shared")
    inner = keras.Sequential([keras.Input((3,)), shared, shared], name="inner")
    cumulative = syncbn.SyncBatchNormalization(momentum=None, name="cumulative")
    model = keras.Sequential(
        [keras.Input((3,)), Block(name="block"), inner, cumulative, keras.layers.Dense(1)]
    )
    for batch in np.random.default_rng(1).normal(2, 1, size=(3, 5, 3)):
        model(tf.constant(batch, tf.float32), training=True)
    return model


def test_they_are_those_of_the_layers_by_name(model):
    statistics = syncbn.moving_statistics(model)
    center, plain, shared, cumulative = statistics
    assert center == "block/center"
    assert plain.startswith("block/batch_normalization")
    assert (shared, cumulative) == ("inner/shared", "cumulative")
    assert statistics[center].variance is None
    assert [one.count is None for one in statistics.values()] == [True, True, True, False]
    np.testing.assert_array_equal(statistics[cumulative].count, [15, 15, 15])
    layer = model.get_layer("inner").get_layer("shared")
    np.testing.assert_array_equal(statistics[shared].mean, layer.moving_mean.numpy())
    np.testing.assert_array_equal(statistics[shared].variance, layer.moving_variance.numpy())


def test_a_layer_by_itself_has_its_own():
    layer = syncbn.SyncCentering(name="center")
    assert syncbn.moving_statistics(layer) == {}
    layer(tf.ones([2, 3]), training=True)
    np.testing.assert_allclose(syncbn.moving_statistics(layer)["center"].mean, 0.01, rtol=1e-5)


def test_they_can_be_set_and_all_else_stays(model):
    before = syncbn.moving_statistics(model)
    weights = [w.numpy() for w in model.trainable_variables]
    new = {
        "inner/shared": syncbn.MovingStatistics(variance=[4, 5, 6]),
        "cumulative": ([1, 2, 3], None, [7, 7, 7]),
    }
    syncbn.set_moving_statistics(model, new)
    after = syncbn.moving_statistics(model)
    np.testing.assert_array_equal(after["inner/shared"].variance, [4, 5, 6])
    np.testing.assert_array_equal(after["inner/shared"].mean, before["inner/shared"].mean)
    np.testing.assert_array_equal(after["cumulative"].mean, [1, 2, 3])
    np.testing.assert_array_equal(after["cumulative"].variance, before["cumulative"].variance)
    np.testing.assert_array_equal(after["cumulative"].count, [7, 7, 7])
    for name in list(before)[:2]:
        np.testing.assert_array_equal(after[name].mean, before[name].mean)
    for weight, old in zip(model.trainable_variables, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    syncbn.set_moving_statistics(model, before)
    for name, one in syncbn.moving_statistics(model).items():
        for actual, expected in zip(one, before[name], strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nobody", (), "normalizations of the model: block/center.*Received: nobody"),
        ("inner/shared", ([1, 2],), r"moving_mean of inner/shared must have shape \(3,\)"),
        ("inner/shared", ([1, 2, np.nan],), "must be finite"),
        ("inner/shared", (None, [1, -2, 3]), "moving_variance of inner/shared must not be neg"),
        ("inner/shared", (None, None, [1, 1, 1]), "moving_count of inner/shared cannot be set"),
        ("block/center", (None, [1, 1, 1]), "moving_variance of block/center cannot be set"),
    ],
)
def test_bad_statistics_are_refused_and_nothing_is_set(model, name, values, message):
    before = model.get_weights()
    good = {"cumulative": ([1, 2, 3],)}
    with pytest.raises(ValueError, match=message):
        syncbn.set_moving_statistics(model, {**good, name: values})
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_under_a_strategy_every_replica_gets_them(mirrored):
    replicas = mirrored(2)
    with replicas.strategy.scope():
        layer = syncbn.SyncBatchNormalization(name="norm")
        layer.build((None, 3))
    syncbn.set_moving_statistics(layer, {"norm": ([1, 2, 3],)})
    for value in replicas.moving([layer])["moving_mean"].values():
        np.testing.assert_array_equal(value, [1, 2, 3])
    np.testing.assert_array_equal(syncbn.moving_statistics(layer)["norm"].mean, [1, 2, 3])
