"""Training helpers in one process: what they do without an engine, and what they refuse."""

import warnings

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from tests.keras import KERAS_3, keras

OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Ftrl", "Nadam"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_distributed_optimizer_is_of_the_same_class_and_round_trips(name):
    plain = getattr(keras.optimizers, name)(0.03)
    optimizer = training.distribute(plain, "local")
    assert optimizer is plain
    assert isinstance(optimizer, getattr(keras.optimizers, name))
    assert type(optimizer).__name__ == name
    assert optimizer.get_config()["learning_rate"] == pytest.approx(0.03)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is type(optimizer)
    assert copy.get_config() == optimizer.get_config()
    assert copy.get_config()["communicator"] == "local"


def test_it_trains_as_before_in_one_process():
    weights = []
    for wrap in (lambda optimizer: optimizer, training.distribute):
        weight = tf.Variable([1.0, 2.0])
        optimizer = wrap(keras.optimizers.Adam(0.1))
        for _ in range(3):
            optimizer.apply_gradients([(tf.constant([0.1, -2.0]), weight)])
        weights.append(weight.numpy())
    np.testing.assert_array_equal(*weights)


def test_the_state_of_an_optimizer_stays():
    weight = tf.Variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.apply_gradients([(tf.constant([1.0, 1.0]), weight)])
    training.distribute(optimizer)
    assert int(optimizer.iterations) == 1
    optimizer.apply_gradients([(tf.constant([1.0, 1.0]), weight)])
    np.testing.assert_allclose(weight.numpy(), [1 - 0.1 - 0.19, 2 - 0.1 - 0.19], rtol=1e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5", pytest.param("", id="SavedModel")])
def test_a_compiled_model_is_saved_and_loaded(suffix, tmp_path):
    if KERAS_3 and suffix == "":
        pytest.skip("Keras 3 writes no compiled model as a SavedModel")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    # Horovod is not initialized here: a model is loaded without the engine that trained it.
    optimizer = training.distribute(keras.optimizers.Adam(0.01))
    model.compile(optimizer, keras.losses.MeanSquaredError())
    x = np.ones((4, 3), "float32")
    model.fit(x, x[:, :2], verbose=0)
    training_on = model.optimizer.get_config()
    path = str(tmp_path / f"model{suffix}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        model.save(path)
    loaded = keras.models.load_model(path)
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert loaded.optimizer.get_config() == training_on
    if suffix:  # the SavedModels of Keras 2 forget the state of any optimizer
        assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)


def test_a_loaded_optimizer_asks_for_an_engine_when_it_trains():
    config = training.distribute(keras.optimizers.SGD(0.1), "mpi").get_config()
    optimizer = training.distribute(keras.optimizers.SGD(0.1), "local")
    optimizer = type(optimizer).from_config(config)
    assert optimizer.get_config()["communicator"] == "mpi"


def test_distribute_says_what_it_cannot_take():
    with pytest.raises(TypeError, match=r"`optimizer` must be one of tf\.keras\.optimizers"):
        training.distribute("sgd")
    with pytest.raises(ValueError, match="`communicator` must be one of"):
        training.distribute(keras.optimizers.SGD(), "nccl")
    with pytest.raises(ValueError, match="distributed already"):
        training.distribute(training.distribute(keras.optimizers.SGD()))


def test_an_optimizer_around_a_distributed_one_is_refused():
    scaling = keras.optimizers if KERAS_3 else keras.mixed_precision
    inner = training.distribute(keras.optimizers.SGD())
    with pytest.raises(ValueError, match="averaged twice"):
        training.distribute(scaling.LossScaleOptimizer(inner))


def test_without_other_workers_broadcast_metrics_and_join_change_nothing():
    variable = tf.Variable([1.0, 2.0])
    training.broadcast(variable)
    np.testing.assert_array_equal(variable.numpy(), [1, 2])
    with pytest.raises(ValueError, match=r"0 to 0\. Received: root=1"):
        training.broadcast(variable, root=1)

    joined = training.join(tf.data.Dataset.range(3).batch(2))
    assert [batch.numpy().tolist() for batch in joined] == [[0, 1], [2]]
    pairs = tf.data.Dataset.range(3).map(lambda i: (i, i)).batch(2)
    weighted = training.join(pairs, sample_weight=True)
    assert [w.numpy().tolist() for _, _, w in weighted] == [[1, 1], [1]]

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    callbacks = [training.BroadcastVariables(), training.AverageMetrics()]
    x = np.ones((4, 3), "float32")
    history = model.fit(x, x[:, :1], validation_data=(x, x[:, :1]), verbose=0, callbacks=callbacks)
    assert {"loss", "mae", "val_loss", "val_mae"} <= set(history.history)


def test_broadcast_is_not_for_graphs():
    variable = tf.Variable(1.0)
    with pytest.raises(RuntimeError, match="must be called eagerly"):
        tf.function(lambda: training.broadcast(variable))()
