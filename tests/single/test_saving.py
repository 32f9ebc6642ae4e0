"""Weights survive every way of saving them, inside and outside of a strategy's scope."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import processes
from tests.keras import KERAS_3, keras
from tests.kinds_of_replicas import _local_values


@pytest.fixture(params=["outside", "inside"])
def scope(request, mirrored):
    """Gives the context in which a model is made; a strategy's scope, or nothing."""
    if request.param == "outside":
        return contextlib.nullcontext
    return mirrored(2).strategy.scope


def trained(momentum=0.5):
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            syncbn.SyncBatchNormalization(momentum=momentum, name="normalized"),
            syncbn.SyncCentering(momentum=momentum, name="centered"),
            keras.layers.Dense(2, name="dense"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).normal(3, 2, size=(16, 4, 3)).astype("float32")
    model.fit(x, x[..., :2], batch_size=8, epochs=2, verbose=0)
    return model, x[:4]


def assert_same(restored, model, x):
    for one, other in zip(restored.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(restored.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("momentum", [0.5, None])
def test_a_keras_file_restores_the_model(scope, momentum, tmp_path):
    with scope():
        model, x = trained(momentum)
    model.save(tmp_path / "model.keras")
    assert_same(keras.models.load_model(tmp_path / "model.keras"), model, x)
    with scope():
        restored = keras.models.load_model(tmp_path / "model.keras")
    assert_same(restored, model, x)
    layer = restored.get_layer("normalized")
    assert isinstance(layer, syncbn.SyncBatchNormalization)
    assert layer.momentum == momentum


def test_a_weights_file_restores_the_weights(scope, tmp_path):
    with scope():
        model, x = trained()
        # Not compiled: in a scope Keras 2 cannot load the variables of metrics from such a file.
        other = keras.models.clone_model(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(other, model, x)


def test_a_checkpoint_restores_the_variables(scope, tmp_path):
    with scope():
        model, x = trained()
        other, _ = trained()
    model.layers[0].set_weights([w + 1 for w in model.layers[0].get_weights()])
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=other).restore(
        path
    ).expect_partial().assert_existing_objects_matched()
    assert_same(other, model, x)


def test_a_model_trained_under_a_strategy_is_restored_without_one(mirrored, tmp_path):
    with mirrored(2).strategy.scope():
        model, x = trained()
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    other, _ = trained()
    tf.train.Checkpoint(model=other).restore(path).expect_partial()
    assert_same(other, model, x)


def test_the_checkpoint_of_a_plain_layer_fits(scope, tmp_path):
    def build(make):
        return keras.Sequential([keras.Input((3,)), make(name="normalized")])

    plain = build(keras.layers.BatchNormalization)
    plain.layers[0].set_weights(np.random.default_rng(0).random((4, 3), "float32"))
    with scope():
        ours = build(syncbn.SyncBatchNormalization)
    path = tf.train.Checkpoint(model=plain).save(str(tmp_path / "plain"))
    tf.train.Checkpoint(model=ours).restore(path).expect_partial()
    x = np.random.default_rng(1).random((5, 3), "float32")
    np.testing.assert_array_equal(ours.get_weights(), plain.get_weights())
    np.testing.assert_array_equal(ours.predict(x, verbose=0), plain.predict(x, verbose=0))


def test_an_exported_model_serves_without_syncbn(scope, tmp_path):
    with scope():
        model, x = trained()
    model.export(str(tmp_path / "exported"))
    np.save(tmp_path / "x.npy", x)
    finished = processes.run([("serve", processes.program("serve", str(tmp_path)), {})])
    assert finished.code == 0, finished.output
    y = model.predict(x, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), y, rtol=1e-5, atol=1e-6)


def test_saving_and_loading_does_not_depend_on_the_engine(tmp_path):
    # The file stores the name; whoever loads it for inference needs no engine.
    model = keras.Sequential([keras.Input((3,)), syncbn.SyncCentering(communicator="horovod")])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].communicator == "horovod"
    np.testing.assert_array_equal(loaded(np.ones((2, 3), "float32")), np.ones((2, 3)))


def test_a_clone_has_the_same_options():
    model, _ = trained(None)
    clone = keras.models.clone_model(model)
    assert [layer.get_config() for layer in clone.layers] == [
        layer.get_config() for layer in model.layers
    ]


@pytest.mark.skipif(KERAS_3, reason="Keras 3 writes SavedModels by export only, tested above")
@pytest.mark.parametrize("communicator", ["auto", "horovod", "mpi"])
def test_a_saved_model_folder_needs_no_engine(communicator, scope, tmp_path):
    # Keras 2 traces the layers in training too when it writes one, wherever that is.
    with scope():
        layer = syncbn.SyncBatchNormalization(communicator=communicator)
        model = keras.Sequential([keras.Input((3,)), layer])
        model.save(tmp_path / "folder", save_format="tf")
    x = np.ones((2, 3), "float32")
    assert_same(keras.models.load_model(tmp_path / "folder"), model, x)


@pytest.mark.skipif(KERAS_3, reason="Keras 3 writes SavedModels by export only, tested above")
def test_a_saved_model_folder_restores_the_model(scope, tmp_path):
    with scope():
        model, x = trained()
    x_train = np.ones((4, 4, 3), "float32")
    # `fit` runs its callbacks inside the scope.
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "checkpoint"), save_format="tf")
    model.fit(x_train, x_train[..., :2], verbose=0, callbacks=[checkpoint])
    assert_same(keras.models.load_model(tmp_path / "checkpoint"), model, x)
    model.save(tmp_path / "folder", save_format="tf")
    assert_same(keras.models.load_model(tmp_path / "folder"), model, x)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_what_is_saved_is_a_few_ulps_from_the_copies(size, mirrored, tmp_path):
    # TensorFlow adds up the copies, which are equal, and divides; neither need be exact.
    strategy = mirrored(size).strategy
    with strategy.scope():
        layer, other = (syncbn.SyncBatchNormalization(momentum=0.9) for _ in range(2))
        for one in (layer, other):
            one.build((None, 1000))
    x = np.random.default_rng(size).normal(3, 2, size=(size, 4, 1000)).astype("float32")
    parts = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(x[context.replica_id_in_sync_group])
    )
    strategy.run(lambda part: layer(part, training=True), args=(parts,))

    def copies(one):
        return {
            name: _local_values(strategy, getattr(one, name))
            for name in ("moving_mean", "moving_variance")
        }

    def assert_equal(one):
        for values in copies(one).values():
            for value in values[1:]:
                np.testing.assert_array_equal(value, values[0])

    def assert_near(one, expected):
        for name, value in expected.items():
            ulps = np.abs(getattr(one, name).numpy() - value) / np.spacing(np.abs(value))
            assert ulps.max() <= (size + 3) / 2 - 3 / size

    assert_equal(layer)
    own = {name: values[0] for name, values in copies(layer).items()}
    assert_near(layer, own)
    assert any(np.any(getattr(layer, name).numpy() != value) for name, value in own.items())
    path = tf.train.Checkpoint(layer=layer).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(layer=other).restore(path)
    # After loading, each copy is what was saved.
    assert_equal(other)
    for name, values in copies(other).items():
        np.testing.assert_array_equal(values[0], getattr(layer, name).numpy())
    layer.set_weights(layer.get_weights())
    assert_equal(layer)
