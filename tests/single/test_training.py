"""Training helpers in one process: what they do without an engine, and what they refuse."""

import json
import warnings

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from syncbn._src.keras_compat.optimizer_state import optimizer_variables, state_of
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


def test_how_it_exchanges_round_trips():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    optimizer = training.distribute(
        keras.optimizers.SGD(0.1),
        local=layer,
        scale_local_gradients=False,
        backward_passes_per_step=3,
        average_aggregated_gradients=True,
    )
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.get_config() == optimizer.get_config()
    # Which variables are local is nothing that a file can say.
    weight = tf.Variable(1.0)
    with pytest.raises(ValueError, match="must be told which variables are local"):
        copy.apply_gradients([(tf.constant(1.0), weight)])
    copy.register_local_var(layer)
    for _ in range(3):
        copy.apply_gradients([(tf.constant(1.0), weight)])
    assert float(weight) == pytest.approx(0.9)


def test_passes_add_up_in_one_process_too():
    for optimizer in (
        keras.optimizers.SGD(0.1),
        tf.compat.v1.train.GradientDescentOptimizer(0.1),
    ):
        weight = tf.Variable([1.0, 2.0])
        training.distribute(optimizer, backward_passes_per_step=2)
        step = tf.function(
            lambda g, o=optimizer, w=weight: (o.apply_gradients([(g, w)]), tf.constant(0))[1]
        )
        for number in range(3):
            step(tf.constant([1.0, number]))
        np.testing.assert_allclose(weight, [1 - 0.2, 2 - 0.1], rtol=1e-6)


def test_passes_under_a_strategy_of_one_replica_are_refused_in_a_graph():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        weight = tf.Variable([1.0])
        optimizer = training.distribute(keras.optimizers.SGD(1.0), backward_passes_per_step=2)
        optimizer.build([weight])
    step = tf.function(
        lambda: strategy.run(lambda: (optimizer.apply_gradients([(tf.ones([1]), weight)]), 0)[1])
    )
    with pytest.raises(NotImplementedError, match="Received: MirroredStrategy with one replica"):
        step()


def test_halves_are_added_up_in_single_precision():
    weight = tf.Variable(tf.zeros([1], tf.float16))
    optimizer = training.distribute(keras.optimizers.SGD(1.0), backward_passes_per_step=4)
    for gradient in 2048.0, 1.0, 1.0, -2048.0:  # 2049 is no half
        optimizer.apply_gradients([(tf.constant([gradient], tf.float16), weight)])
    np.testing.assert_array_equal(weight, [-2.0])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_mean_of_halves_overflows_only_if_it_is_too_large_itself(sparse):
    weight = tf.Variable(tf.zeros([1, 1], tf.float16))
    optimizer = training.distribute(
        keras.optimizers.SGD(1.0), backward_passes_per_step=4, average_aggregated_gradients=True
    )
    gradient = tf.constant([[30000.0]], tf.float16)
    if sparse:
        gradient = tf.IndexedSlices(gradient, tf.constant([0]), tf.constant([1, 1]))
    for _ in range(4):
        optimizer.apply_gradients([(gradient, weight)])
    np.testing.assert_array_equal(weight, [[-30000.0]])


def test_local_variables_and_the_norm_of_all_gradients_exclude_each_other():
    weight = tf.Variable([1.0])
    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=1.0)
    training.distribute(optimizer, local=weight)
    with pytest.raises(ValueError, match=r"Received: global_clipnorm=1\.0\. Use clipnorm"):
        optimizer.apply_gradients([(tf.constant([1.0]), weight)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_known_what_an_optimizer_keeps_of_a_variable(name):
    # As many variables as an optimizer has of its own, which must not be taken for them.
    weights = [tf.Variable(tf.fill([n + 1], float(n))) for n in range(2)]
    optimizer = getattr(keras.optimizers, name)(0.1)
    if name in ("SGD", "RMSprop"):
        optimizer = getattr(keras.optimizers, name)(0.1, momentum=0.9)
    optimizer.apply_gradients([(tf.ones_like(weight), weight) for weight in weights])
    state = [one for one in optimizer_variables(optimizer) if len(one.shape)]
    assert state
    for weight in weights:
        own = [one for one in state if one.shape[0] == weight.shape[0]]
        assert [id(one) for one in state_of(optimizer, [weight])] == [id(one) for one in own]


def test_an_optimizer_whose_state_is_not_known_is_refused_where_variables_are_local():
    class Odd(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            make = {"shape": [2, 2], "name": "odd"}
            self.odd = self.add_variable(**make, **({} if KERAS_3 else {"dtype": "float32"}))

    weight = tf.Variable([1.0])
    optimizer = training.distribute(Odd(0.1), local=weight)
    optimizer.build([weight])
    with pytest.raises(ValueError, match=r"Received: Odd, for whose .*odd"):
        state_of(optimizer, [weight])


def test_a_learning_rate_needs_a_rate_and_a_warm_up_needs_epochs():
    with pytest.raises(ValueError, match="`base_rate` must be positive"):
        training.LearningRateSchedule(0.0, 1.0)
    with pytest.raises(ValueError, match="`warmup_epochs` must be positive"):
        training.LearningRateWarmup(0.1, 0)
    with pytest.raises(ValueError, match="`communicator` must be one of"):
        training.LearningRateWarmup(0.1, communicator="nccl")


def test_one_replica_warms_up_to_what_it_has():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.RMSprop(0.5, momentum=0.9), "mse")
    x = np.ones((4, 3), "float32")
    callbacks = [
        training.LearningRateWarmup(0.1, 1),
        training.LearningRateSchedule(0.1, 0.5, start_epoch=1),
    ]
    history = model.fit(x, x[:, :1], epochs=2, verbose=0, callbacks=callbacks).history
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.05], rtol=1e-6)


def test_a_schedule_of_the_optimizer_is_not_replaced():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.3, 1, 0.5)
    kinds = [keras.optimizers.SGD] + ([] if KERAS_3 else [keras.optimizers.legacy.SGD])
    x = np.ones((4, 3), "float32")
    for kind in kinds:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(kind(schedule), "mse")
        later = training.LearningRateSchedule(0.1, 1.0, start_epoch=1)
        logs = model.fit(x, x[:, :1], epochs=1, verbose=0, callbacks=[later]).history
        assert 0.1 < logs["learning_rate"][0] < 0.4
        with pytest.raises(TypeError, match=r"not settable|must be a number"):
            model.fit(x, x[:, :1], verbose=0, callbacks=[training.LearningRateWarmup(0.1, 1)])


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


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is not registered."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate * 0.5 ** tf.cast(step, tf.float32)

    def get_config(self):
        return {"rate": self.rate}


def test_a_schedule_that_is_not_registered_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(training.distribute(keras.optimizers.Adam(Halving(0.1))), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    custom_objects = {"Halving": Halving}
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=custom_objects)
    assert isinstance(loaded.optimizer._learning_rate, Halving)


def test_the_config_of_an_optimizer_that_scales_the_loss_is_json():
    scaling = keras.optimizers if KERAS_3 else keras.mixed_precision
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    scaled = scaling.LossScaleOptimizer(keras.optimizers.Adam(schedule))
    assert "ExponentialDecay" in json.dumps(training.distribute(scaled).get_config())


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
    with pytest.raises(TypeError, match="must be variables or layers"):
        training.distribute(keras.optimizers.SGD(), local=["head"])
    for passes in 0, 1.5:
        with pytest.raises(ValueError, match=f"Received: backward_passes_per_step={passes}"):
            training.distribute(keras.optimizers.SGD(), backward_passes_per_step=passes)
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


@pytest.mark.parametrize("every", [0, -1, True])
def test_recalibration_is_refused_what_it_cannot_do(every):
    with pytest.raises(ValueError, match="`every` must be a positive integer, or None"):
        training.Recalibrate([np.ones([2, 3])], every=every)
    with pytest.raises(ValueError, match="Received: an iterator"):
        training.Recalibrate(iter([np.ones([2, 3])]))
