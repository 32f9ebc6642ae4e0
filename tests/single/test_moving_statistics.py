"""Moving statistics where users meet them: fit, tapes, and the questions that this began from."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import keras
from tests.kinds_of_replicas import _local_values


def batch(rng, low, high, size=10):
    return rng.integers(low, high, size).astype("float32").reshape(-1, 1)


def test_a_tape_with_training_true_moves_them():
    """The question about BatchNormalization with GradientTape, with the outputs it wanted."""
    model = keras.Sequential([keras.Input((1,)), syncbn.SyncBatchNormalization()])
    optimizer = keras.optimizers.Adam(0.5)
    rng = np.random.default_rng(0)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = model(x, training=True)
            loss = tf.reduce_mean(tf.square(y - 150.0))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for _ in range(1000):
        step(tf.constant(batch(rng, 100, 110)))
    layer = model.layers[-1]
    np.testing.assert_allclose(layer.moving_mean, [104.5], atol=0.5)
    np.testing.assert_allclose(layer.moving_variance, [8.25], rtol=0.2)
    y = model(batch(rng, 100, 110, 100))
    np.testing.assert_allclose(y, np.full((100, 1), 150.0), atol=1.0)


def test_a_tape_without_training_leaves_them_alone():
    model = keras.Sequential([keras.Input((1,)), syncbn.SyncBatchNormalization()])
    with tf.GradientTape():
        model(np.full((10, 1), 100, "float32"))
    np.testing.assert_array_equal(model.layers[-1].moving_mean, [0])


def test_a_functional_model_can_fix_the_mode_of_a_layer(mirrored):
    """The answer with ``BatchNormalization()(x, training=True)``."""

    def build():
        inputs = keras.Input((4, 4, 3))
        x = keras.layers.Conv2D(3, 3, padding="same")(inputs)
        return keras.Model(inputs, syncbn.SyncBatchNormalization()(x, training=True))

    x = np.random.default_rng(0).random((4, 4, 4, 3), "float32")
    model = build()
    model(x)
    assert np.abs(model.layers[-1].moving_mean).min() > 0
    with mirrored(2).strategy.scope():
        # Built outside of the replicas, where Keras only asks for shapes.
        model = build()
        model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    assert np.abs(model.layers[-1].get_weights()[2]).min() > 0


def test_they_can_be_read_and_set_as_keras_users_do():
    """The answer with ``get_weights`` and ``set_weights``."""
    model = keras.Sequential([keras.Input((2,)), syncbn.SyncBatchNormalization(name="bn")])
    weights = model.get_layer("bn").get_weights()  # gamma, beta, moving mean, moving variance
    weights[2][:], weights[3][:] = 5.0, 4.0
    model.get_layer("bn").set_weights(weights)
    y = model(np.full((3, 2), 7, "float32"))
    np.testing.assert_allclose(y, np.full((3, 2), 2 / np.sqrt(4.001)), rtol=1e-6)


def test_centering_learns_a_mean_in_fit_and_keeps_it(tmp_path):
    """The question about removing the mean "without considering the variance"."""
    model = keras.Sequential(
        [keras.Input((5, 3)), syncbn.SyncCentering(momentum=0.9), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    x = np.random.default_rng(0).normal([10, -20, 30], 2, size=(64, 5, 3)).astype("float32")
    model.fit(x, x[..., :1], epochs=30, batch_size=16, verbose=0)
    np.testing.assert_allclose(model.layers[0].get_weights()[0], x.mean((0, 1)), rtol=0.02)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed precision"])
def test_replicas_never_differ_by_a_bit(mixed, mirrored):
    strategy = mirrored(2).strategy
    policy = "mixed_bfloat16" if mixed else "float32"
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6, 6, 3)),
                keras.layers.Conv2D(8, 3, dtype=policy),
                syncbn.SyncBatchNormalization(dtype=policy, momentum=0.9),
                keras.layers.Activation("relu"),
                syncbn.SyncCentering(dtype=policy, momentum=None),
                keras.layers.Flatten(),
                keras.layers.Dense(2),
            ]
        )
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, size=(37, 6, 6, 3)).astype("float32")
    model.fit(x, rng.normal(size=(37, 2)), batch_size=8, epochs=5, verbose=0)
    for variable in model.non_trainable_variables:
        first, second = _local_values(strategy, variable)
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(variable.numpy(), first)


def test_a_custom_loop_under_a_strategy_survives_partial_batches(mirrored):
    strategy = mirrored(2).strategy
    with strategy.scope():
        layer = syncbn.SyncBatchNormalization(momentum=None)
        layer.build((None, 3))
    x = np.random.default_rng(0).normal(size=(9, 3)).astype("float32")
    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(x).batch(4))

    @tf.function
    def step(batch):
        strategy.run(lambda part: layer(part, training=True), args=(batch,))

    for part in data:
        step(part)
    np.testing.assert_allclose(layer.moving_mean.numpy(), x.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_count.numpy(), [9, 9, 9])
