"""Momenta that are variables: schedules, by a callback or by hand."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import KERAS_3, keras, with_renormalization
from tests.kinds_of_replicas import _local_values

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
MAKERS = {
    "tf": lambda value: tf.Variable(value, trainable=False, dtype=tf.float64),
    "trainable": lambda value: tf.Variable(value, dtype=tf.float32),
}
if KERAS_3:
    MAKERS["keras"] = lambda value: keras.Variable(value, dtype="float32")
VARIABLES = pytest.mark.parametrize("variable", MAKERS.values(), ids=MAKERS)
SCHEDULE = (0.0, 0.5, 0.75, 1.0, 0.25)  # exact in every dtype


def batches(number, channels=3):
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, size=(number, 8, channels)).astype("float32")


def after(schedule, targets):
    """The moving average, from zero."""
    value = np.zeros(targets[0].shape)
    for momentum, target in zip(schedule, targets, strict=True):
        value = momentum * value + (1 - momentum) * target
    return value


@BOTH
@VARIABLES
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_variable_is_read_at_each_training_call(make, variable, policy, graph):
    momentum, data = variable(0.9), batches(len(SCHEDULE))
    # bfloat16 holds these.
    data = tf.cast(tf.cast(data, tf.bfloat16), tf.float32).numpy()
    layer = make(momentum=momentum, dtype=policy)
    call = tf.function(lambda x: layer(x, training=True)) if graph else layer
    for value, x in zip(SCHEDULE, data, strict=True):
        momentum.assign(value)
        call(x, **({} if graph else {"training": True}))
    expected = after(SCHEDULE, data.astype("float64").mean(1))
    np.testing.assert_allclose(layer.moving_mean, expected, rtol=1e-6)


@VARIABLES
def test_it_is_no_weight_of_the_layer(variable):
    momentum = variable(0.5)
    layer, plain = (syncbn.SyncBatchNormalization(momentum=m) for m in (momentum, 0.5))
    for one in (layer, plain):
        one.build((None, 3))
    assert [w.shape for w in layer.weights] == [w.shape for w in plain.weights]
    assert len(layer.trainable_weights) == 2
    layer.momentum.assign(0.25)
    assert float(momentum.numpy()) == 0.25
    # Not by assignment either.
    plain.momentum = momentum
    assert len(plain.weights) == 4
    assert len(plain.trainable_weights) == 2


@BOTH
@VARIABLES
def test_a_config_has_its_present_value(make, variable):
    momentum = variable(0.9)
    layer = make(momentum=momentum)
    momentum.assign(0.25)
    config = layer.get_config()
    assert (type(config["momentum"]), config["momentum"]) == (float, 0.25)
    assert make.from_config(config).get_config() == config


@pytest.mark.parametrize("kind", [tf.constant, np.float32, np.array, float])
def test_a_scalar_is_a_number(kind):
    layer = syncbn.SyncCentering(momentum=kind(0.5))
    assert (type(layer.momentum), layer.momentum) == (float, 0.5)


@with_renormalization
@VARIABLES
def test_that_of_renorm_may_be_one_too(variable):
    momentum, data = variable(0.9), batches(len(SCHEDULE))
    layer = syncbn.SyncBatchNormalization(momentum=0.5, renorm=True, renorm_momentum=momentum)
    step = tf.function(lambda x: layer(x, training=True))
    for value, x in zip(SCHEDULE, data, strict=True):
        momentum.assign(value)
        step(x)
    means = data.astype("float64").mean(1)
    np.testing.assert_allclose(layer.renorm_mean, after(SCHEDULE, means), rtol=1e-6)
    np.testing.assert_allclose(layer.moving_mean, after([0.5] * 5, means), rtol=1e-6)
    assert layer.get_config()["renorm_momentum"] == SCHEDULE[-1]
    assert len(layer.weights) == 7


@BOTH
@pytest.mark.parametrize(
    ("value", "graph"), [(1.5, False), (-0.25, True), (float("nan"), True)], ids=str
)
def test_a_value_out_of_range_is_an_error_in_the_step_that_meets_it(make, value, graph):
    momentum = tf.Variable(0.5, trainable=False)
    layer = make(momentum=momentum)
    layer.build((None, 3))

    def call(x):
        return layer(x, training=True)

    call, x = tf.function(call) if graph else call, tf.ones([2, 3])
    call(x)
    before = layer.get_weights()
    momentum.assign(value)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`momentum` must lie in \[0, 1\]"):
        call(x)
    np.testing.assert_array_equal(layer.moving_mean, before[-2 if len(before) > 1 else 0])
    layer(x, training=False)  # inference does not ask for it
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*Received: momentum="):
        layer.momentum = value


def test_xla_which_leaves_checks_out_makes_nan_of_it():
    momentum = tf.Variable(0.5, trainable=False)
    layer = syncbn.SyncBatchNormalization(momentum=momentum)
    layer.build((None, 3))
    call = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    call(tf.ones([2, 3]))
    np.testing.assert_array_equal(layer.moving_mean, 0.5)
    momentum.assign(1.5)
    call(tf.ones([2, 3]))
    assert np.isnan(layer.moving_mean).all()


def test_a_callback_schedules_it_in_fit_on_replicas(mirrored, tmp_path):
    strategy = mirrored(2).strategy
    with strategy.scope():
        momentum = tf.Variable(0.9, trainable=False)
        layer = syncbn.SyncBatchNormalization(momentum=momentum, name="layer")
        model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    data = batches(len(SCHEDULE))
    x = data.reshape(-1, 3)
    schedule = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: momentum.assign(SCHEDULE[batch])
    )
    model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0, callbacks=[schedule])
    for copy in _local_values(strategy, layer.moving_mean):
        expected = after(SCHEDULE, data.astype("float64").mean(1))
        np.testing.assert_allclose(copy, expected, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("layer").momentum == SCHEDULE[-1]
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@VARIABLES
@pytest.mark.parametrize("renorm", [False, pytest.param(True, marks=with_renormalization)])
def test_conversion_there_and_back(variable, renorm):
    momentum = variable(0.5)
    options = {"renorm": True, "renorm_momentum": momentum} if renorm else {}
    layer = syncbn.SyncBatchNormalization(momentum=momentum, name="layer", **options)
    model = keras.Sequential([keras.Input((3,)), layer])
    x = batches(2)
    model(x[0], training=True)
    momentum.assign(0.25)
    before = model.predict(x[1], verbose=0)
    assert syncbn.revert_sync_batchnorm(model, return_conversion=True).converted == ("layer",)
    assert type(layer) is keras.layers.BatchNormalization
    assert layer.momentum == 0.25
    assert layer.get_config()["momentum"] == 0.25
    assert not renorm or layer.renorm_momentum == 0.25
    np.testing.assert_array_equal(model.predict(x[1], verbose=0), before)
    assert syncbn.convert_sync_batchnorm(
        model, momentum=momentum, return_conversion=True
    ).converted == ("layer",)
    momentum.assign(0.0)
    model(x[1], training=True)
    np.testing.assert_allclose(layer.moving_mean, x[1].mean(0), rtol=1e-6)
    assert len(layer.weights) == (7 if renorm else 4)


@pytest.mark.skipif(KERAS_3, reason="Keras 3 does not trace layers in training when it saves")
def test_a_saved_model_folder_needs_no_variable(tmp_path):
    momentum = tf.Variable(0.5, trainable=False)
    model = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization(momentum=momentum)])
    model.save(tmp_path / "folder", save_format="tf")
    assert keras.models.load_model(tmp_path / "folder").layers[-1].momentum == 0.5


@pytest.mark.skipif(KERAS_3, reason="variables of layers are never autocast within a constructor")
def test_a_variable_that_keras_autocasts_is_refused():
    class Outer(keras.layers.Layer):
        def build(self, shape):
            self.share = self.add_weight("share", (), initializer=lambda *_, **__: 0.99)
            self.inner = syncbn.SyncCentering(momentum=self.share, dtype=self.dtype_policy)

        def call(self, x):
            return self.inner(x, training=True)

    with pytest.raises(TypeError, match="does not autocast"):
        Outer(dtype="mixed_bfloat16")(tf.ones([2, 3]))
