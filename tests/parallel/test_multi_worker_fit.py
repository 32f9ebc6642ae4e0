"""`fit`, `evaluate` and `predict` of several workers are those of one process with all batches."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import KERAS_3, keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE

pytestmark = pytest.mark.skipif(
    ENGINE != "multiworker",
    reason="several workers of one strategy; test_fit.py is about fit on the other engines",
)

BATCH, STEPS, EPOCHS = 4, 10, 2  # the batch is of one worker; the steps are of one epoch


def make(communicator="auto", rate=0.1):
    keras.utils.set_random_seed(3)
    layer = syncbn.SyncBatchNormalization(momentum=0.9, communicator=communicator)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, use_bias=False),
            layer,
            keras.layers.Activation("tanh"),
            keras.layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(rate), "mse", metrics=["mae"], jit_compile=False)
    return model


def draw(samples):
    rng = np.random.default_rng(samples)
    x, y = rng.normal(2, 3, (samples, 3)), rng.normal(size=(samples, 2))
    return x.astype("float32"), y.astype("float32")


def dataset(x, y, strategy):
    data = tf.data.Dataset.from_tensor_slices((x, y))
    return {"x": data.batch(BATCH * strategy.num_replicas_in_sync)}


def endless_dataset(x, y, strategy):
    return {"x": dataset(x, y, strategy)["x"].repeat(), "steps_per_epoch": STEPS}


def dataset_of_each_worker(x, y, strategy):
    def own(context):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
        return data.shard(context.num_input_pipelines, context.input_pipeline_id).repeat()

    return {"x": strategy.distribute_datasets_from_function(own), "steps_per_epoch": STEPS}


def fit(model, **options):
    return model.fit(shuffle=False, verbose=0, **options).history


def assert_same_weights(model, expected):
    # Read on all workers: a moving statistic is a mean over them.
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


def assert_same_history(history, expected, epochs):
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        assert len(values) == epochs
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


def test_twenty_steps_and_their_validation_are_those_of_one_process(replicas):
    step = BATCH * replicas.size
    x, y = draw(STEPS * step)
    unseen = draw(2 * step + 1)  # does not divide
    options = {"x": x, "y": y, "batch_size": step, "epochs": EPOCHS}
    options |= {"validation_data": unseen, "validation_batch_size": step}
    with replicas.strategy.scope():
        model = make()
    expected = make("local")
    assert_same_history(fit(model, **options), fit(expected, **options), EPOCHS)
    assert_same_weights(model, expected)
    np.testing.assert_allclose(
        model.evaluate(*unseen, batch_size=step, verbose=0),
        expected.evaluate(*unseen, batch_size=step, verbose=0),
        rtol=1e-5,
    )
    # Each worker gets the outputs of all of them, in the order of the samples.
    outputs = model.predict(unseen[0], batch_size=step, verbose=0)
    theirs = expected.predict(unseen[0], batch_size=step, verbose=0)
    np.testing.assert_allclose(outputs, theirs, rtol=1e-4, atol=1e-5)


def test_datasets_of_every_kind_train_as_one_process_does(replicas):
    step = BATCH * replicas.size
    x, y = draw(STEPS * step)
    expected = make("local")
    initial = expected.get_weights()
    expected_history = fit(expected, x=x, y=y, batch_size=step, epochs=EPOCHS)
    with replicas.strategy.scope():
        model = make()
    for given in dataset, endless_dataset, dataset_of_each_worker:
        model.set_weights(initial)
        history = fit(model, **given(x, y, replicas.strategy), epochs=EPOCHS)
        assert_same_history(history, expected_history, EPOCHS)
        assert_same_weights(model, expected)


def test_metrics_and_statistics_of_batches_that_do_not_divide(replicas):
    step = BATCH * replicas.size
    # Each worker's gradient weighs the same, whatever its share of a batch; so the weights stay.
    with replicas.strategy.scope():
        model = make(rate=0.0)
    expected = make("local", rate=0.0)
    for samples in 1, 2 * step - 1:
        x, y = draw(samples)
        options = {"x": x, "y": y, "batch_size": step}
        assert_same_history(fit(model, **options), fit(expected, **options), 1)
        assert_same_weights(model, expected)


def test_shuffled_arrays_are_shared_out_when_the_seeds_are_equal(replicas):
    step = BATCH * replicas.size
    x, _ = draw(STEPS * step)
    y = np.arange(len(x), dtype="float32")[:, None]
    with replicas.strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.set_weights([np.zeros((3, 1))])
    keras.utils.set_random_seed(4)
    losses = model.fit(x, y, batch_size=step, epochs=EPOCHS, shuffle=True, verbose=0)
    # A sample that two workers read, or none, would change the mean.
    np.testing.assert_allclose(losses.history["loss"], [np.mean(y**2)] * EPOCHS, rtol=1e-5)


@pytest.mark.parametrize("overflows", [0, 1])
def test_no_worker_takes_a_step_where_the_gradients_of_one_overflow(replicas, overflows):
    training.mend_keras_fit()  # as a synchronized layer in the scope does
    scales = np.full(replicas.size, 0.01)
    scales[overflows] = 100.0
    with replicas.strategy.scope():
        dense = keras.layers.Dense(1, dtype="mixed_float16", kernel_initializer="ones")
        model = keras.Sequential([keras.Input((3,)), dense])
        optimizer = workers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
        model.compile(optimizer, "mse", jit_compile=False)
    x, y = scales[:, None] * np.ones((len(scales), 3)), np.zeros((len(scales), 1))
    fit(model, x=x, y=y, batch_size=len(x))
    np.testing.assert_array_equal(model.get_weights()[0], np.ones((3, 1)))
    scale = optimizer.dynamic_scale.value if KERAS_3 else optimizer.loss_scale
    assert float(replicas.strategy.experimental_local_results(scale)[0]) == 2**14


def test_all_workers_write_checkpoints_each_to_its_own_path(replicas, tmp_path):
    rank = replicas.strategy.cluster_resolver.task_id
    path = tmp_path / f"worker-{rank}.keras"
    x, y = draw(2 * BATCH * replicas.size)
    with replicas.strategy.scope():
        model = make()
    fit(model, x=x, y=y, batch_size=8, callbacks=[keras.callbacks.ModelCheckpoint(str(path))])
    weights = model.get_weights()
    # That of Keras 2 removes what the workers other than the first have written.
    assert path.exists() == (KERAS_3 or rank == 0)
    if path.exists():
        for ours, theirs in zip(keras.models.load_model(path).get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
