"""`fit` in separate processes: equal starts, metrics of all samples."""

import importlib

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.keras_compat.optimizer_state import optimizer_variables
from tests.keras import KERAS_3, keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import LossScaleOptimizer, compiled, same_on_all_ranks, samples
from tests.two_optimizers import TwoOptimizers

pytestmark = workers.in_separate_processes


def test_broadcast_gives_all_workers_the_values_of_one(replicas):
    def values(rank):
        return [
            np.full((2, 3), rank, "float32"),
            np.array(2**60 + rank, "int64"),
            np.array([rank == 0, True]),
            np.array([rank, 1.5, np.inf], "float16"),
            np.array([rank, np.nan, -0.0, 5e-324], "float64"),
            # Zeros of both signs, the least number, NaNs of several kinds, infinity.
            np.array([0, 1 << 31, 1, 0x7FC00001, 0xFFC00001, 0x7F800000], "uint32").view("float32"),
            np.array(-0.0, "float16"),
            np.array([rank + 1j, complex(-0.0, -0.0)], "complex64"),
            np.array([rank, -1, 7], "int8"),
            np.zeros([0, 2], "float32"),
        ]

    variables = [tf.Variable(value) for value in values(replicas.rank)]
    root = replicas.size - 1
    training.broadcast({"nested": variables}, root=root)
    for ours, theirs in zip(variables, values(root), strict=True):
        assert ours.numpy().shape == theirs.shape
        assert ours.numpy().tobytes() == theirs.tobytes()


def test_strings_are_not_broadcast(replicas):
    with pytest.raises(TypeError, match="`variables` must hold numbers"):
        training.broadcast([tf.Variable(1.0), tf.Variable("text")])


def test_what_was_broadcast_is_the_same_bit_for_bit(replicas):
    model = compiled()
    if replicas.rank == 0:
        model.set_weights([-0.0 * weight for weight in model.get_weights()])
    training.broadcast(model.weights)
    syncbn.assert_synchronized(model, weights=True)


def test_workers_with_different_models_are_told(replicas):
    odd = replicas.size - 1
    own = [tf.Variable(tf.zeros([2])), tf.Variable(tf.zeros([3 + (replicas.rank == odd)]))]
    with pytest.raises(ValueError, match=rf"on rank {odd} than on rank 0.* is number 1;"):
        training.broadcast(own)
    with pytest.raises(ValueError, match=rf"on rank {odd} than on rank 0.* is number 1;"):
        training.broadcast(own[: 1 + (replicas.rank != odd)])
    with pytest.raises(ValueError, match=f"Received: root={replicas.size}"):
        training.broadcast(own, root=replicas.size)


def test_training_starts_from_the_variables_of_the_root(replicas):
    keras.utils.set_random_seed(replicas.rank)  # each worker with weights of its own
    model = compiled()
    x, y = samples(8 * replicas.size)
    own = slice(8 * replicas.rank, 8 * replicas.rank + 8)
    model.fit(x[own], y[own], batch_size=4, verbose=0, callbacks=[training.BroadcastVariables()])
    for weight in model.get_weights():
        same_on_all_ranks(weight)
    of_optimizer = model.optimizer.variables
    for weight in of_optimizer() if callable(of_optimizer) else of_optimizer:
        same_on_all_ranks(weight.numpy())


def test_training_goes_on_from_the_model_that_the_root_has_loaded(replicas, tmp_path):
    x, y = samples(8)
    model = compiled()
    if replicas.rank == 0:
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        for variable in optimizer_variables(optimizer):
            if len(variable.shape):
                variable.assign(variable + 0.5)
        optimizer.iterations.assign(7)
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[training.BroadcastVariables()])
    assert int(model.optimizer.iterations) == 9
    for variable in (*model.weights, *optimizer_variables(model.optimizer)):
        same_on_all_ranks(variable.numpy())


def test_workers_on_which_keras_has_numbered_layers_otherwise_are_told_the_way_out(replicas):
    other = replicas.rank == replicas.size - 1
    callbacks = [training.BroadcastVariables()]
    frozen = compiled(syncbn.SyncBatchNormalization(name=f"norm_{other:d}", trainable=False))
    frozen.fit(*samples(4), verbose=0, callbacks=callbacks)  # it sends nothing
    model = compiled(syncbn.SyncBatchNormalization(name=f"norm_{other:d}"))
    with pytest.raises(ValueError, match="give the model and the layers names"):
        model.fit(*samples(4), verbose=0, callbacks=callbacks)


def test_the_learning_rate_and_the_loss_scale_are_those_of_the_root(replicas):
    root = replicas.rank == 0
    sgd = keras.optimizers.SGD(0.01 if root else 0.1)
    scaled = LossScaleOptimizer(sgd, initial_scale=8.0 if root else 2.0**15)
    optimizer = training.distribute(scaled)
    model = compiled(optimizer=optimizer)
    optimizer.build(model.trainable_variables)
    model.fit(*samples(8), batch_size=4, verbose=0, callbacks=[training.BroadcastVariables()])
    scale = optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    assert float(scale) == 8.0


def two_optimizers(**options):
    model = TwoOptimizers()
    optimizers = [training.distribute(keras.optimizers.Adam(0.1)) for _ in range(2)]
    model.compile(*optimizers, **options)
    return model


def fit_two(model, *callbacks):
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)


def test_all_optimizers_of_a_model_start_from_the_state_of_the_root(replicas):
    model = two_optimizers()
    state = [one for each in (model.of_first, *model.others) for one in optimizer_variables(each)]
    for variable in state:
        if len(variable.shape):
            variable.assign(variable + replicas.rank)
    fit_two(model, training.BroadcastVariables())
    for variable in (*model.weights, *state):
        same_on_all_ranks(variable.numpy())


def test_an_optimizer_that_is_built_on_some_workers_only_is_an_error_on_all(replicas):
    model = two_optimizers(build=replicas.rank == 0)
    with pytest.raises(ValueError, match=r"of_first, built on rank 0 only\. Build it on all"):
        fit_two(model, training.BroadcastVariables())


def test_workers_with_other_layers_are_told(replicas):
    # All weights have the same shapes, and the last worker would wait for nobody.
    odd = replicas.rank == replicas.size - 1
    kind = keras.layers.BatchNormalization if odd else syncbn.SyncBatchNormalization
    model = compiled(kind(name="norm"))  # named, or later layers would have other numbers on one
    with pytest.raises(ValueError, match="must have the same synchronized layers"):
        model.fit(*samples(4), verbose=0, callbacks=[training.BroadcastVariables()])


def test_random_generators_stay_different(replicas):
    layers = [keras.Input((200,)), keras.layers.Dropout(0.5, seed=replicas.rank)]
    model = keras.Sequential(layers)
    model.compile(training.distribute(keras.optimizers.SGD()), "mse", jit_compile=False)
    x = np.ones((1, 200), "float32")
    callback = training.BroadcastVariables()
    callback.set_model(model)
    callback.on_train_begin()
    mask = model(x, training=True).numpy()
    total = syncbn.resolve().all_reduce_sum(tf.constant(mask), "masks").numpy()
    assert not np.array_equal(total, replicas.size * mask)


def test_a_wrapped_optimizer_that_is_distributed_inside_is_refused(replicas):
    optimizer = LossScaleOptimizer(training.distribute(keras.optimizers.SGD(0.1)))
    model = compiled(optimizer=optimizer)
    with pytest.raises(RuntimeError, match="distribute the optimizer that scales the loss"):
        model.fit(*samples(4), verbose=0, callbacks=[training.BroadcastVariables()])


def test_metrics_are_those_of_all_samples(replicas):
    # Workers have different numbers of samples, and the last has none in its last batch.
    sizes = [4 * (replicas.size - rank) for rank in range(replicas.size)]
    start, own = sum(sizes[: replicas.rank]), sizes[replicas.rank]
    x, y = samples(sum(sizes))
    part = slice(start, start + own)
    metrics = ["accuracy", keras.metrics.AUC(name="auc")]
    # Nothing moves, so that all batches are seen with the same weights.
    keras.utils.set_random_seed(0)
    frozen = keras.layers.BatchNormalization(trainable=False)
    still = training.distribute(keras.optimizers.SGD(0.0))
    model = compiled(frozen, optimizer=still, metrics=metrics)
    dataset = tf.data.Dataset.from_tensor_slices((x[part], y[part])).batch(4)
    history = model.fit(
        training.join(dataset),
        validation_data=dataset,
        epochs=2,
        verbose=0,
        shuffle=False,
        callbacks=[training.BroadcastVariables(), training.AverageMetrics()],
    ).history
    alone = compiled(
        keras.layers.BatchNormalization(trainable=False),
        optimizer=keras.optimizers.SGD(0.0),
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
        run_eagerly=True,
    )
    alone.set_weights(model.get_weights())
    expected = alone.evaluate(x, y, verbose=0, return_dict=True)
    assert set(history) == {*expected, *(f"val_{name}" for name in expected)}
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(history[f"val_{name}"], value, rtol=1e-5, err_msg=name)


class Evaluates(keras.callbacks.Callback):
    """Evaluates other data at the end of each epoch."""

    def on_epoch_end(self, epoch, logs=None):
        x, y = samples(4)
        self.model.evaluate(x, y + 100, verbose=0)


def test_what_a_callback_evaluates_is_not_logged_as_training(replicas):
    x, y = samples(8 * replicas.size)
    own = slice(8 * replicas.rank, 8 * replicas.rank + 8)
    model = compiled(optimizer=training.distribute(keras.optimizers.SGD(0.0)), metrics=["mae"])
    logs = []
    for before in [], [Evaluates()]:
        callbacks = [training.BroadcastVariables(), *before, training.AverageMetrics()]
        options = {"batch_size": 4, "shuffle": False, "verbose": 0, "epochs": 2}
        logs.append(model.fit(x[own], y[own], **options, callbacks=callbacks).history)
        assert "reset_metrics" not in vars(model)
    for name, values in logs[0].items():
        np.testing.assert_allclose(logs[1][name], values, rtol=1e-5, err_msg=name)


def test_a_step_may_reset_its_metrics_and_a_model_have_a_reset_of_its_own(replicas):
    class Resets(keras.Model):
        def train_step(self, data):
            self.reset_metrics()
            return super().train_step(data)

    def own_reset():
        keras.Model.reset_metrics(model)

    x, y = samples(8)
    inputs = keras.Input((x.shape[1],))
    model = Resets(inputs, keras.layers.Dense(y.shape[1] if y.ndim > 1 else 1)(inputs))
    model.compile(training.distribute(keras.optimizers.SGD(0.0)), "mse", metrics=["mae"])
    model.evaluate(x, y, verbose=0)  # Keras 2 creates the metrics here
    model.reset_metrics = own_reset
    callbacks = [training.BroadcastVariables(), training.AverageMetrics()]
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks).history
    assert np.isfinite(history["mae"]).all()
    assert model.reset_metrics is own_reset


# What Keras 3 says after the first epoch of an empty dataset.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_callbacks_see_validation_that_only_some_workers_have_data_for(replicas):
    if not KERAS_3:
        pytest.skip("Keras 2 itself refuses to validate on nothing; join the validation data")
    x, y = samples(8)
    own = slice(0, 8 if replicas.rank == 0 else 0)
    validation = tf.data.Dataset.from_tensor_slices((x[own], y[own])).batch(4)
    metrics = training.AverageMetrics()
    stop = keras.callbacks.EarlyStopping("val_loss", patience=0, min_delta=1e9)
    history = compiled().fit(
        x,
        y,
        validation_data=validation,
        epochs=5,
        verbose=0,
        callbacks=[training.BroadcastVariables(), metrics, stop],
    )
    assert len(history.history["val_loss"]) == 2
    same_on_all_ranks(history.history["val_loss"])


def test_weights_that_gradients_leave_different_are_an_error_in_the_first_steps(replicas):
    x, y = samples(8 * replicas.size)
    own = slice(8 * replicas.rank, 8 * replicas.rank + 8)
    model = compiled(optimizer=keras.optimizers.SGD(0.1))
    last = replicas.size - 1
    with pytest.raises(
        RuntimeError, match=rf"at the end of step [12]: .*{last} than on rank 0, .*SGD"
    ):
        model.fit(
            x[own], y[own], batch_size=4, verbose=0, callbacks=[training.BroadcastVariables()]
        )
    # Who averages otherwise, or not yet, says so.
    different = training.BroadcastVariables(same_weights=False)
    model.fit(x[own], y[own], batch_size=4, verbose=0, callbacks=[different])


@pytest.mark.skipif(ENGINE != "horovod" or not KERAS_3, reason="Keras 2 has what Horovod changes")
@pytest.mark.parametrize("package", ["horovod.tensorflow", "horovod.tensorflow.keras"])
def test_optimizers_of_horovod_average_nothing_under_keras_3_and_are_found_out(package, replicas):
    wrap = importlib.import_module(package).DistributedOptimizer
    model = compiled(optimizer=wrap(keras.optimizers.SGD(0.1)))
    x, y = samples(4 * replicas.size)
    own = slice(4 * replicas.rank, 4 * replicas.rank + 4)
    with pytest.raises(RuntimeError, match=r"averages nothing under Keras 3"):
        model.fit(
            x[own], y[own], batch_size=2, verbose=0, callbacks=[training.BroadcastVariables()]
        )


def test_gradients_that_a_train_step_averages_are_averaged(replicas):
    class Own(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
            tape = training.DistributedGradientTape(tape)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    inputs = keras.Input((3,))
    model = Own(inputs, keras.layers.Dense(1)(syncbn.SyncBatchNormalization()(inputs)))
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    x, y = samples(8 * replicas.size)
    own = slice(8 * replicas.rank, 8 * replicas.rank + 8)
    model.fit(x[own], y[own], batch_size=4, verbose=0, callbacks=[training.BroadcastVariables()])


class AtTheEnd(keras.callbacks.Callback):
    """Does something on the last worker, at the end of a batch or of an epoch, and counts."""

    def __init__(self, replicas, does, epoch=1, batch=None):
        super().__init__()
        self.last, self.does = replicas.rank == replicas.size - 1, does
        self.at, self.epoch, self.batches = (epoch, batch), 0, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.last and self.at == (self.epoch, batch):
            self.does(self.model)

    def on_epoch_end(self, epoch, logs=None):
        if self.last and self.at == (epoch, None):
            self.does(self.model)


def stop(model):
    model.stop_training = True


@pytest.mark.parametrize(
    "batch",
    [
        None,
        pytest.param(
            2,
            marks=pytest.mark.skipif(
                ENGINE != "mpi", reason="over Horovod workers agree on epochs"
            ),
        ),
    ],
)
@pytest.mark.parametrize("callback", [training.BroadcastVariables, training.AverageMetrics])
def test_all_workers_stop_where_one_does_wherever_the_callback_stands(callback, batch, replicas):
    at_the_end = AtTheEnd(replicas, stop, batch=batch)
    keras.utils.set_random_seed(0)
    for callbacks in [callback(), at_the_end], [at_the_end, callback()]:
        at_the_end.batches = 0
        history = compiled().fit(*samples(16), 4, epochs=3, verbose=0, callbacks=callbacks)
        assert at_the_end.batches == (8 if batch is None else 4 + batch + 1)
        assert type(history) is keras.callbacks.History


def test_other_learning_rates_are_an_error_in_that_epoch(replicas):
    def other(model):
        model.optimizer.learning_rate = 0.01

    at_the_end = AtTheEnd(replicas, other)
    callbacks = [training.BroadcastVariables(), at_the_end]
    with pytest.raises(RuntimeError, match=r"the same learning rate.* epoch 2: 0\.1.*, 0\.0"):
        compiled().fit(*samples(16), 4, epochs=3, verbose=0, callbacks=callbacks)
    assert at_the_end.batches == 8


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("callback", [training.BroadcastVariables, training.AverageMetrics])
def test_workers_that_begin_at_other_epochs_are_told(callback, left, replicas):
    epochs = {"initial_epoch": 2 if replicas.rank else 3, "epochs": 4 if left else 3}
    with pytest.raises(ValueError, match=f"same epoch. Received: {3 if left else 'none'}, 2"):
        compiled().fit(*samples(8), 4, **epochs, verbose=0, callbacks=[callback()])
