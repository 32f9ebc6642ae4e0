"""Whole training loops in sessions, as TensorFlow 1 has them."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.training.sessions import prediction_variables

keras = tf.keras
v1 = tf.compat.v1

OPTIMIZERS = {
    "gradient descent": lambda: v1.train.GradientDescentOptimizer(0.01),
    "momentum": lambda: v1.train.MomentumOptimizer(0.01, 0.9),
    "adam": lambda: v1.train.AdamOptimizer(0.01),
    "keras sgd": lambda: keras.optimizers.legacy.SGD(0.01, momentum=0.9),
    "keras adam": lambda: keras.optimizers.legacy.Adam(0.01),
}


def data(steps, size=8):
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (steps, size, 3)).astype("float32")
    return x, (x @ [1, -2, 3])[..., None].astype("float32")


def layers(normalization):
    """A network that starts from the same weights, whatever normalizes."""

    def dense(inputs, units, activation):
        kernel = np.random.default_rng(units).normal(size=(inputs, units))
        initializer = keras.initializers.Constant(kernel)
        # Without a bias, which normalization takes out again: its gradient is nothing but noise.
        return keras.layers.Dense(units, activation, use_bias=False, kernel_initializer=initializer)

    return [
        normalization(momentum=0.9),
        dense(3, 4, "tanh"),
        normalization(momentum=0.8),
        dense(4, 1, None),
    ]


def apply(layers, x, **kwargs):
    for layer in layers:
        x = layer(x, **(kwargs if layer.name.count("normalization") else {}))
    return x


def weights_of(layers):
    return [weight for layer in layers for weight in layer.weights]


def minimize(optimizer, loss, trained):
    if isinstance(optimizer, v1.train.Optimizer):
        return optimizer.minimize(loss, var_list=trained)
    return tf.group(optimizer.get_updates(loss, trained))


@pytest.mark.parametrize(
    ("name", "source"), [*((name, "collection") for name in OPTIMIZERS), ("adam", "layers")]
)
def test_a_train_op_trains_as_one_process_with_plain_layers(name, source, workers, run):
    # Each worker also trains plain layers on the whole batch: weights and statistics end up alike.
    x, target = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.float32, [None, 1])
    training = v1.placeholder_with_default(False, [])
    plain_x, plain_target = (v1.placeholder(tf.float32, t.shape) for t in (x, target))
    ours, plain = layers(syncbn.SyncBatchNormalization), layers(keras.layers.BatchNormalization)

    error = tf.reduce_sum((apply(ours, x, training=training) - target) ** 2) / 8
    collected = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
    updates = [update for layer in ours for update in layer.updates]
    trained = [weight for layer in ours for weight in layer.trainable_weights]
    with tf.control_dependencies(collected if source == "collection" else updates):
        train_op = distributed(OPTIMIZERS[name](), error, trained, workers)

    plain_error = tf.reduce_sum((apply(plain, plain_x, training=True) - plain_target) ** 2) / 8
    with tf.control_dependencies([update for layer in plain for update in layer.updates]):
        plain_trained = [weight for layer in plain for weight in layer.trainable_weights]
        plain_op = minimize(OPTIMIZERS[name](), plain_error, plain_trained)

    for batch, wanted in zip(*data(5), strict=True):
        feed = {x: workers.part(batch), target: workers.part(wanted), training: True}
        run([train_op, plain_op], {**feed, plain_x: batch, plain_target: wanted})
        run(error, feed)  # moves nothing
    for one, other in zip(run(weights_of(ours)), run(weights_of(plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def distributed(optimizer, error, trained, workers):
    """Minimizes the sum of the workers' errors, which is the mean of so many times each."""
    return minimize(syncbn.training.distribute(optimizer), workers.size * error, trained)


def test_the_learning_phase_is_fed_as_to_a_keras_model(workers, run):
    model = keras.Sequential([keras.Input([3]), *layers(syncbn.SyncBatchNormalization)])
    phase = keras.backend.learning_phase()
    with tf.control_dependencies(model.updates):
        train_op = v1.train.GradientDescentOptimizer(0.0).minimize(tf.reduce_sum(model.output))
    mean = np.zeros(3)
    for batch in data(3)[0]:
        run(train_op, {model.input: workers.part(batch), phase: 1})
        mean += 0.1 * (batch.mean(0) - mean)
    run(model.output, {model.input: data(1)[0][0], phase: 0})
    np.testing.assert_allclose(run(model.layers[0].moving_mean), mean, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`Model.state_updates` will be removed")  # Keras' own use
@pytest.mark.parametrize("momentum", [0.9, None])
def test_fit_moves_the_statistics_once_per_batch(momentum, workers, run):
    normalization = syncbn.SyncBatchNormalization(momentum=momentum)
    model = keras.Sequential([keras.Input([3]), normalization, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    run([])
    x, y = data(4)
    # The second half of each batch is the second worker's.
    parts = [v.reshape(4, workers.size, -1, v.shape[-1])[:, workers.rank] for v in (x, y)]
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    model.fit(*flat, batch_size=8 // workers.size, shuffle=False, verbose=0)
    model.evaluate(*flat, batch_size=8, verbose=0)
    model.predict(flat[0])
    mean = np.zeros(3)
    for step, batch in enumerate(x):
        rate = 1 / (step + 1) if momentum is None else 0.1
        mean += rate * (batch.mean(0) - mean)
    np.testing.assert_allclose(normalization.get_weights()[2], mean, rtol=1e-5)


def test_a_saver_of_the_prediction_variables_restores_for_prediction(workers, run, tmp_path):
    def build(training):
        x = v1.placeholder(tf.float32, [None, 3])
        network = [
            syncbn.SyncBatchNormalization(momentum=None),
            syncbn.SyncCentering(momentum=None),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
            syncbn.SyncCentering(axis=1),
        ]
        y = x
        for layer in network:
            y = layer(y, training=training) if "dense" not in layer.name else layer(y)
        return x, y

    training = v1.placeholder_with_default(False, [])
    x, y = build(training)
    with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
        step = v1.train.get_or_create_global_step()
        train_op = v1.train.AdamOptimizer(0.01).minimize(tf.reduce_sum(y**2), global_step=step)
    names = [variable.op.name for variable in prediction_variables()]
    assert names == [
        "sync_batch_normalization/gamma",
        "sync_batch_normalization/beta",
        "sync_batch_normalization/moving_mean",
        "sync_batch_normalization/moving_variance",
        "sync_batch_normalization/moving_count",
        "sync_centering/moving_mean",
        "sync_centering/moving_count",
        "batch_normalization/gamma",
        "batch_normalization/beta",
        "batch_normalization/moving_mean",
        "batch_normalization/moving_variance",
        "dense/kernel",
        "dense/bias",
        "sync_centering_1/moving_mean",
    ]
    batches = data(3)[0]
    for batch in batches:
        run(train_op, {x: workers.part(batch), training: True})
    expected = run(y, {x: batches[0]})
    saver = v1.train.Saver(prediction_variables())
    path = saver.save(run.session, str(tmp_path / "model"))
    assert sorted(name for name, _ in tf.train.list_variables(path)) == sorted(names)

    with tf.Graph().as_default() as graph:
        x, y = build(False)
        assert v1.get_collection(v1.GraphKeys.UPDATE_OPS) == []
        restorer = v1.train.Saver(prediction_variables())
        with v1.Session() as session:
            restorer.restore(session, path)
            np.testing.assert_array_equal(session.run(y, {x: batches[0]}), expected)
    assert len(prediction_variables(graph)) == len(names)

    with tf.Graph().as_default():  # and from the graph that the saver wrote beside it
        v1.train.import_meta_graph(f"{path}.meta")
        assert [variable.op.name for variable in prediction_variables()] == names
