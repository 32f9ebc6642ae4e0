"""Batch renormalization and virtual batches are those of Keras itself, where it has them."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import KERAS_3, keras, with_renormalization

CLIPPING = {"rmin": 0.6, "rmax": 1.4, "dmax": 0.5}
OPTIONS = [
    pytest.param(options, marks=with_renormalization)
    for options in (
        {"renorm": True},
        {"renorm": True, "renorm_clipping": CLIPPING, "renorm_momentum": 0.7},
        {"renorm": True, "momentum": 0.5, "center": False},
    )
]
VIRTUAL = [{"virtual_batch_size": 2}, {"virtual_batch_size": 4}, {"virtual_batch_size": 12}]
MIXED = pytest.param(
    {"virtual_batch_size": 3, "renorm": True, "renorm_clipping": CLIPPING},
    marks=with_renormalization,
)


def run(layer, steps=4):
    """Trains and returns all that can be seen: outputs, gradients, weights, and an inference."""
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(steps):
        x = tf.constant(rng.normal(2, 3, size=(12, 5, 4)), tf.float32)
        dy = tf.constant(rng.normal(size=x.shape), tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        gradients = tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)
        seen += [y, *gradients]
    seen += layer.weights
    seen.append(layer(tf.ones([12, 5, 4]), training=False))
    return [np.ravel(tensor) for tensor in seen]


@pytest.mark.parametrize("options", OPTIONS + ([] if KERAS_3 else [*VIRTUAL, MIXED]), ids=str)
def test_one_replica_is_the_layer_of_keras(options):
    ours = run(syncbn.SyncBatchNormalization(**options))
    stock = run(keras.layers.BatchNormalization(**options))
    assert len(ours) == len(stock)
    for mine, truth in zip(ours, stock, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", [*OPTIONS, *VIRTUAL, MIXED], ids=str)
def test_the_options_are_part_of_the_config(options, tmp_path):
    layer = syncbn.SyncBatchNormalization(**options)
    model = keras.Sequential([keras.Input((5, 4)), layer])
    x = np.random.default_rng(0).normal(size=(12, 5, 4)).astype("float32")
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.layers[-1].get_config() == layer.get_config()
    np.testing.assert_array_equal(again(x), model(x))
    np.testing.assert_array_equal(again(x, training=True), model(x, training=True))


@with_renormalization
def test_a_plain_layer_with_renorm_can_be_read():
    config = keras.layers.BatchNormalization(renorm=True, renorm_clipping=CLIPPING).get_config()
    layer = syncbn.SyncBatchNormalization.from_config(config)
    assert layer.renorm
    assert layer.renorm_clipping == CLIPPING


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_virtual_batch_size_that_is_none(size):
    with pytest.raises(ValueError, match=r"`virtual_batch_size` must be a positive integer"):
        syncbn.SyncBatchNormalization(virtual_batch_size=size)


def test_virtual_batches_in_groups():
    with pytest.raises(ValueError, match=r"virtual batches with less.*group_size=2.*Use one"):
        syncbn.SyncBatchNormalization(virtual_batch_size=2, group_size=2)


def test_renorm_with_an_unbiased_variance():
    with pytest.raises(ValueError, match=r"averages deviations.*Use one"):
        syncbn.SyncBatchNormalization(renorm=True, unbiased_moving_variance=True)


def test_virtual_batches_of_a_normalized_batch():
    with pytest.raises(ValueError, match=r"slices of axis 0.*axis=0"):
        syncbn.SyncBatchNormalization(axis=0, virtual_batch_size=2).build((4, 3))


@with_renormalization
def test_constant_channels_without_epsilon_make_no_nan():
    layer = syncbn.SyncBatchNormalization(renorm=True, renorm_momentum=0.0, epsilon=0.0)
    for _ in range(3):
        assert np.isfinite(layer(tf.ones([4, 2]), training=True)).all()


@with_renormalization
@pytest.mark.parametrize("momentum", [None, -0.1, 1.1, float("nan")])
def test_a_momentum_of_renorm_outside_of_its_range(momentum):
    with pytest.raises(ValueError, match=r"`renorm_momentum` must lie in \[0, 1\]"):
        syncbn.SyncBatchNormalization(renorm=True, renorm_momentum=momentum)


@pytest.mark.parametrize(
    "clipping",
    [{"rmix": 1}, {"rmin": 2, "rmax": 1}, {"dmax": -1}, {"rmin": -1}, {"rmax": float("nan")}],
    ids=str,
)
def test_clipping_that_is_none(clipping):
    with pytest.raises(ValueError, match=r"renorm_clipping.*Received"):
        syncbn.SyncBatchNormalization(renorm=True, renorm_clipping=clipping)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has always had renormalization")
def test_a_keras_without_renorm(monkeypatch):
    def init(self, axis=-1, **kwargs):
        raise AssertionError("never called")

    monkeypatch.setattr(keras.layers.BatchNormalization, "__init__", init)
    with pytest.raises(NotImplementedError, match=r"Keras 3\.14, or Keras 2.*pip install -U keras"):
        syncbn.SyncBatchNormalization(renorm=True)
