"""A tape whose gradients are the means over the workers."""

import time

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import Counting, same_on_all_ranks


def build(norm):
    layers = [keras.layers.Embedding(5, 4), keras.layers.Flatten(), norm, keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((2,), dtype="int32"), *layers])


@workers.on_one_level
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("entered", [False, True], ids=["given", "entered"])
def test_its_gradients_are_those_of_one_process(replicas, entered, graph):
    rng = np.random.default_rng(0)
    x = rng.integers(5, size=(3, replicas.size, 4, 2)).astype("int32")
    keras.utils.set_random_seed(0)
    model, alone = build(syncbn.SyncBatchNormalization()), build(keras.layers.BatchNormalization())
    alone.set_weights(model.get_weights())
    ours, theirs = keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)

    def error(model, x):
        return tf.reduce_mean((model(x, training=True) - tf.cast(x[:, :1], tf.float32)) ** 2)

    def step(x):
        tape = tf.GradientTape()
        tape = training.DistributedGradientTape(tape) if entered else tape
        with tape:
            loss = error(model, x)
        tape = tape if entered else training.DistributedGradientTape(tape)
        gradients = tape.gradient(loss, model.trainable_variables)
        assert isinstance(gradients[0], tf.IndexedSlices)
        ours.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = tf.function(step) if graph else step
    for batch in x:
        step(tf.constant(batch[replicas.rank]))
        with tf.GradientTape() as tape:
            loss = error(alone, tf.constant(batch.reshape(-1, 2)))
        gradients = tape.gradient(loss, alone.trainable_variables)
        theirs.apply_gradients(zip(gradients, alone.trainable_variables, strict=True))
    for weight, truth in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(weight, truth, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(weight)


@workers.on_one_level
def test_sources_may_be_nested_and_gradients_weighted_or_missing(replicas):
    rank, size = float(replicas.rank), replicas.size
    x, y, own = tf.Variable([2.0, 3.0]), tf.Variable(1.0), tf.Variable(1.0)
    with tf.GradientTape(persistent=True) as tape:
        target = rank * x * own
    tape = training.DistributedGradientTape(tape, local=[own])
    sources = {"a": x, "b": (y, own)}
    mean = sum(range(size)) / size
    for _ in range(2):  # it is a persistent one
        found = tape.gradient(target, sources, output_gradients=tf.constant([1.0, 10.0]))
        np.testing.assert_allclose(found["a"], [mean, 10 * mean], rtol=1e-6)
        assert found["b"][0] is None
        np.testing.assert_allclose(found["b"][1], rank * 32 / size, rtol=1e-6)
    zero = tape.gradient(target, y, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    assert float(zero) == 0
    whole = training.DistributedGradientTape(tape._tape, local=own, scale_local_gradients=False)
    np.testing.assert_allclose(whole.gradient(target, own), rank * 5, rtol=1e-6)


@workers.on_one_level
def test_workers_with_other_gradients_are_told(replicas):
    odd = replicas.size - 1
    with tf.GradientTape() as tape:
        x = tf.Variable(tf.zeros([2 + (replicas.rank == odd)]))
        loss = tf.reduce_sum(x**2)
    with pytest.raises(ValueError, match=rf"same gradients.*on rank {odd} than on rank 0"):
        training.DistributedGradientTape(tape).gradient(loss, [x])


@pytest.mark.skipif(ENGINE != "mpi", reason="over Horovod workers would wait for each other")
def test_workers_that_change_the_order_are_told(replicas):
    short, long = tf.Variable(tf.ones([2])), tf.Variable(tf.ones([3]))

    def gradients(*sources):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(short) + 10.0 * tf.reduce_sum(long)
        return training.DistributedGradientTape(tape).gradient(y, sources)

    gradients(short, long)
    gradients(long, short)
    # As many numbers, of other variables: added up, they would be nobody's gradients.
    with pytest.raises(RuntimeError, match=r"on rank 0 syncbn/tape.*on rank 1 syncbn/tape"):
        gradients(*((long, short) if replicas.rank else (short, long)))


@workers.on_one_level
def test_the_iterations_of_a_loop_do_not_meet_each_other(replicas):
    rank, size = replicas.rank, replicas.size
    weight = tf.Variable(1.0)

    def late(number):
        # Which iteration a worker comes to first differs, and TensorFlow runs them in parallel.
        time.sleep(0.2 if number == rank % 2 else 0.0)
        return np.float32(10.0**number * (rank + 1))

    @tf.function
    def total(count):
        weighted = 0.0
        for number in tf.range(count):
            factor = tf.numpy_function(late, [number], tf.float32, stateful=False)
            with tf.GradientTape() as tape:
                y = tf.ensure_shape(factor, []) * weight
            gradient = training.DistributedGradientTape(tape).gradient(y, weight)
            weighted += tf.cast(number + 1, tf.float32) * gradient
        return weighted

    mean = np.mean(range(1, size + 1))
    for _ in range(2):
        np.testing.assert_allclose(total(tf.constant(3)), 321 * mean, rtol=1e-6)


class Equal(Counting):
    """Not hashable, as classes are that say what equals them."""

    def __eq__(self, other):
        return isinstance(other, Equal)


class Alike(Equal):
    """Hashable, and equal to others."""

    def __hash__(self):
        return 0


class Slotted:
    """Neither hashable nor weakly referenced."""

    __slots__ = ("_other", "calls", "name", "rank", "size")
    __eq__ = Equal.__eq__
    __init__ = Counting.__init__
    supports_jit = False
    all_reduce_sum = Counting.all_reduce_sum


@workers.on_one_level
@pytest.mark.parametrize("make", [Counting, Equal, Alike, Slotted])
def test_gradients_are_compared_once_over_each_communicator(replicas, make):
    # Others may have compared theirs over another one, and would wait here.
    weight = tf.Variable(tf.zeros([3, 2, 1, 1]))
    for communicator in [make(syncbn.resolve()) for _ in range(2)]:
        for _ in range(2):
            with tf.GradientTape() as tape:
                y = replicas.rank * weight
            tape = training.DistributedGradientTape(tape, communicator)
            gradient = tape.gradient(y, weight)
            np.testing.assert_allclose(gradient, np.mean(range(replicas.size)), rtol=1e-6)
        assert communicator.calls.count("syncbn/agreement") == 1


@pytest.mark.skipif("mirrored" not in ENGINE, reason="no strategy with several replicas")
def test_optimizers_of_a_strategy_add_up_what_it_gives(replicas):
    with replicas.strategy.scope():
        weight = tf.Variable([0.0])
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([weight])

    def step():
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        with training.DistributedGradientTape(tf.GradientTape()) as tape:
            loss = tf.cast(replicas.first + number, tf.float32) * tf.reduce_sum(weight)
        optimizer.apply_gradients([(tape.gradient(loss, weight), weight)])

    tf.function(lambda: replicas.strategy.run(step))()
    truth = [-sum(range(replicas.size)) / replicas.processes]
    for copy in replicas.strategy.experimental_local_results(weight):
        np.testing.assert_allclose(copy, truth, rtol=1e-6)


def test_it_is_for_tapes(replicas):
    with pytest.raises(TypeError, match=r"`tape` must be a tf\.GradientTape"):
        training.DistributedGradientTape(None)
