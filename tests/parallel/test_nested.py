"""Processes that have several replicas each: what is particular to two levels."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests import kinds_of_replicas as kinds
from tests.control_flow_table import chosen, refusal
from tests.derivatives import unlike
from tests.keras import keras
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import compiled, same_on_all_ranks, samples

pytestmark = pytest.mark.skipif("+" not in ENGINE, reason="one level of replicas")
ACROSS = ENGINE.partition("+")[0]


def communicators():
    kind = {"horovod": syncbn.HorovodCommunicator, "mpi": syncbn.MPICommunicator}[ACROSS]
    return ["auto", ACROSS, kind()]


def values(replicas, function):
    """A value for each replica of this process, of its rank."""
    return replicas.strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(function(replicas.first + context.replica_id_in_sync_group))
    )


def local(replicas, value):
    return [one.numpy() for one in replicas.strategy.experimental_local_results(value)]


def copies(replicas, layer):
    return [list(of_one.values()) for of_one in replicas.moving([layer]).values()]


def test_the_mean_is_that_of_the_replicas_of_all_processes(replicas):
    x = [10.0 * (rank // 2) + rank % 2 for rank in range(replicas.size)]  # 0, 1 | 10, 11
    for communicator in communicators():
        layers = replicas.build(
            lambda rank, given=communicator: syncbn.SyncBatchNormalization(
                momentum=0.0, communicator=given
            ),
            (None, 1),
        )
        inputs = [(tf.constant([[value]]),) for value in x]
        replicas.run(lambda layer, x: layer(x, training=True), layers, inputs)
        assert layers[0].moving_mean.numpy() == np.mean(x) == 5.5
        assert layers[0].moving_variance.numpy() == np.var(x)


def test_processes_may_have_different_numbers_of_replicas(replicas):
    number = replicas.local_size + replicas.process.rank
    own = kinds.mirrored(number)
    first = sum(replicas.local_size + rank for rank in range(replicas.process.rank))
    size = sum(replicas.local_size + rank for rank in range(replicas.process.size))
    whole = np.random.default_rng(0).normal(size=(size, 3, 2)).astype("float32")

    def step(layer, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, x)

    layers = own.build(lambda rank: syncbn.SyncCentering(), (None, 2))
    x64 = whole.astype("float64")
    y = x64 - x64.mean((0, 1))
    dx = 3 * y**2 - (3 * y**2).mean((0, 1))
    for graph in False, True:
        inputs = [(tf.constant(part),) for part in whole[first : first + number]]
        for rank, results in own.run(step, layers, inputs, graph=graph).items():
            for ours, truth in zip(results, (y, dx), strict=True):
                np.testing.assert_allclose(ours, truth[first + rank], atol=1e-5)

    # Ranks, and what an optimizer adds up, count on equal numbers.
    grouped = own.build(lambda rank: syncbn.SyncCentering(group_size=1), (None, 2))
    with pytest.raises(ValueError, match="must have the same numbers of replicas"):
        own.run(lambda layer, x: layer(x, training=True), grouped, inputs)
    optimizer = training.distribute(keras.optimizers.SGD(1.0))
    with own.strategy.scope():
        weight = tf.Variable([1.0])
    with pytest.raises(ValueError, match=r"on this rank.* replicas"):
        own.strategy.run(lambda: optimizer.apply_gradients([(tf.ones([1]), weight)]))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_optimizer_takes_the_mean_over_processes_of_the_sum_over_replicas(replicas, graph):
    with replicas.strategy.scope():
        weight, table = tf.Variable(tf.zeros([3])), tf.Variable(tf.zeros([5, 2]))
        optimizer = training.distribute(keras.optimizers.SGD(1.0))
        optimizer.build([weight, table])
    gradients = np.random.default_rng(1).normal(size=(replicas.size, 3)).astype("float32")
    rows = [[4, 1, 4], [1], [0], [2, 1]]  # of an embedding, say

    def apply(gradient, indices):
        slices = tf.IndexedSlices(tf.ones([tf.shape(indices)[0], 2]), indices, tf.constant([5, 2]))
        optimizer.apply_gradients([(gradient, weight), (slices, table)])

    def run(*inputs):
        replicas.strategy.run(apply, args=inputs)

    inputs = values(replicas, gradients.__getitem__), values(replicas, rows.__getitem__)
    (tf.function(run) if graph else run)(*inputs)
    for ours in local(replicas, weight):
        np.testing.assert_allclose(ours, -gradients.sum(0) / replicas.processes, rtol=1e-5)
    seen = np.bincount(np.concatenate(rows), minlength=5) / replicas.processes
    for ours in local(replicas, table):
        np.testing.assert_allclose(ours, -np.stack([seen, seen], 1), rtol=1e-6)


def test_gradients_of_one_dtype_cost_one_message_of_each_process(replicas):
    with replicas.strategy.scope():
        weights = [tf.Variable(tf.zeros([n + 1])) for n in range(5)]
        optimizer = training.distribute(tf.compat.v1.train.GradientDescentOptimizer(1.0))

    @tf.function
    def run():
        replicas.strategy.run(
            lambda: optimizer.apply_gradients([(tf.ones_like(w), w) for w in weights])
        )

    operations = run.get_concrete_function().graph.get_operations()
    messages = [o for o in operations if o.type in ("HorovodAllreduce", "PyFunc")]
    assert [message.inputs[0].shape.num_elements() for message in messages] == [15]


def frozen():
    """A model that does not change, so that all batches are seen with the same weights."""
    return compiled(
        keras.layers.BatchNormalization(trainable=False),
        optimizer=training.distribute(keras.optimizers.SGD(0.0)),
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
    )


def fitted(replicas, make, data, validation=None):
    """A model trained by all replicas, and its history."""
    keras.utils.set_random_seed(replicas.process.rank)  # each process with weights of its own
    with replicas.strategy.scope():
        model = make()
    callbacks = [training.BroadcastVariables(root=1), training.AverageMetrics()]
    history = model.fit(
        data, validation_data=validation, epochs=2, verbose=0, shuffle=False, callbacks=callbacks
    )
    return model, history.history


def test_fit_starts_equal_and_stays_so_and_reports_for_all_samples(replicas):
    x, y = samples(16 * replicas.processes)
    part = slice(16 * replicas.process.rank, 16 * (replicas.process.rank + 1))
    dataset = tf.data.Dataset.from_tensor_slices((x[part], y[part])).batch(8)
    model, history = fitted(replicas, frozen, dataset, dataset)
    alone = frozen()
    alone.set_weights(model.get_weights())
    expected = alone.evaluate(x, y, verbose=0, return_dict=True)
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(history[f"val_{name}"], value, rtol=1e-5, err_msg=name)

    model, _ = fitted(replicas, compiled, dataset)
    syncbn.assert_synchronized(model, weights=True)
    for weight in model.get_weights():
        same_on_all_ranks(weight)


def test_broadcast_reaches_all_copies(replicas):
    with replicas.strategy.scope():
        weight = tf.Variable([1.0 + replicas.process.rank])
        layer = syncbn.SyncCentering()
        layer.build((None, 1))
        layer.set_weights([np.float32([replicas.process.rank])])
        training.broadcast([weight], root=1)
    training.broadcast([weight, *layer.weights], root=1)
    assert local(replicas, weight) == [[2.0]] * replicas.local_size
    assert copies(replicas, layer) == [[[1.0]] * replicas.local_size]


def test_a_batch_that_each_process_gives_once_is_one_of_as_many(replicas):
    x = np.random.default_rng(2).normal(size=(replicas.processes, 5, 3)).astype("float32")
    own = tf.constant(x[replicas.process.rank])
    with replicas.strategy.scope():
        layer = syncbn.SyncBatchNormalization(momentum=0.0, epsilon=0.0)
        y = layer(own, training=True)
        grouped = syncbn.SyncBatchNormalization(group_size=2)
        with pytest.raises(RuntimeError, match=r"Groups consist of replicas.*MirroredStrategy"):
            grouped(own, training=True)
    rows = x.reshape(-1, 3).astype("float64")
    truth = (x - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(y, truth[replicas.process.rank], atol=1e-5)
    pairs = zip(copies(replicas, layer), (rows.mean(0), rows.var(0)), strict=True)
    for statistic, expected in pairs:
        for value in statistic:
            np.testing.assert_array_equal(value, statistic[0])
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            same_on_all_ranks(value)


def test_a_strategy_alone_does_not_join_the_processes(replicas):
    for communicator in "tf.distribute", syncbn.DistributeCommunicator():
        layers = replicas.build(
            lambda rank, given=communicator: syncbn.SyncCentering(communicator=given), (None, 1)
        )
        inputs = [(tf.ones([2, 1]),)] * replicas.size
        with pytest.raises(RuntimeError, match=rf"joins 1 of the 2 processes that {ACROSS} joins"):
            replicas.run(lambda layer, x: layer(x, training=True), layers, inputs)


@pytest.mark.parametrize("cell", chosen(ENGINE) if "+" in ENGINE else [], ids=str)
def test_control_flow_gives_what_the_table_says(replicas, cell):
    assert not unlike(replicas, cell, refusal(ENGINE, cell))
