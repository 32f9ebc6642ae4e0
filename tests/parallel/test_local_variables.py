"""Variables of each worker's own, neither averaged nor broadcast: the numbers of one process."""

from contextlib import nullcontext

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import KERAS_3, keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import LossScaleOptimizer, kept, same_on_all_ranks, samples

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.03, use_ema=True),
    "scaling the loss": lambda: LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)),
}
if not KERAS_3:
    OPTIMIZERS["legacy"] = lambda: keras.optimizers.legacy.Adam(0.03)


def trunk():
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), syncbn.SyncBatchNormalization()]
    )


def head(rank):
    """The part of a model that each worker has for itself; of another width on each."""
    layers = [keras.layers.Dense(2 + rank), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((4,)), *layers], name=f"head_of_{rank}")


def error(features, head, y):
    return tf.reduce_mean((head(features, training=True) - y) ** 2)


@workers.on_one_level
@pytest.mark.parametrize(
    ("name", "passes", "scale"),
    kept(
        [
            *((name, 1, True) for name in OPTIMIZERS if name != "SGD"),
            ("SGD", 2, True),
            ("SGD", 2, False),
        ],
        ("SGD", 2, True),
    ),
)
def test_each_worker_trains_its_head_as_one_process_trains_all(replicas, name, passes, scale):
    rows, steps = 4, 4
    x, y = samples(steps * replicas.size * rows)
    x, y = (part.reshape(steps, replicas.size, rows, -1) for part in (x, y))
    keras.utils.set_random_seed(0)
    shared, alone = trunk(), trunk()
    alone.set_weights(shared.get_weights())
    heads = [head(rank) for rank in range(replicas.size)]
    own, rank = head(replicas.rank), replicas.rank
    own.set_weights(heads[rank].get_weights())
    optimizer = training.distribute(
        OPTIMIZERS[name](),
        local=own,
        scale_local_gradients=scale,
        backward_passes_per_step=passes,
        average_aggregated_gradients=True,
    )
    ours = [*shared.trainable_variables, *own.trainable_variables]

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = error(shared(x, training=True), own, y)
        optimizer.apply_gradients(zip(tape.gradient(loss, ours), ours, strict=True))

    for batch in zip(x, y, strict=True):
        step(*(tf.constant(part[rank]) for part in batch))

    variables = [*alone.trainable_variables, *(v for one in heads for v in one.trainable_variables)]
    theirs = OPTIMIZERS[name]()
    gradients = [0.0] * len(variables)
    first_local = len(alone.trainable_variables)
    for number in range(steps):
        with tf.GradientTape() as tape:
            features = alone(x[number].reshape(-1, 3), training=True)
            parts = tf.split(features, replicas.size)
            errors = [error(*one) for one in zip(parts, heads, y[number], strict=True)]
            loss = tf.add_n(errors) / replicas.size
        more = tape.gradient(loss, variables)
        gradients = [a + b / passes for a, b in zip(gradients, more, strict=True)]
        if (number + 1) % passes == 0:
            if not scale:
                own_loss = [gradient * replicas.size for gradient in gradients[first_local:]]
                gradients[first_local:] = own_loss
            theirs.apply_gradients(zip(gradients, variables, strict=True))
            gradients = [0.0] * len(variables)
    close = {"rtol": 1e-3, "atol": 1e-5}
    for weight, truth in zip(shared.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(weight, truth, **close)
        same_on_all_ranks(weight)
    for weight, truth in zip(own.get_weights(), heads[rank].get_weights(), strict=True):
        np.testing.assert_allclose(weight, truth, **close)


def whole(rank, optimizer=None):
    """A compiled model of a shared part and one of each worker's own."""
    own = head(rank)
    batch_norm = keras.layers.BatchNormalization(name="own_norm")
    model = keras.Sequential([trunk(), own, batch_norm])
    model.compile(
        training.distribute(optimizer or keras.optimizers.Adam(0.1), local=[own, batch_norm]),
        "mse",
        jit_compile=False,
    )
    return model, [own, batch_norm]


def state(optimizer):
    variables = optimizer.variables
    return list(variables() if callable(variables) else variables)


@workers.on_one_level
@pytest.mark.parametrize("name", kept([name for name in OPTIMIZERS if name != "SGD"], "Adam"))
def test_a_broadcast_leaves_them_and_their_state_alone(replicas, name):
    rank = replicas.rank
    keras.utils.set_random_seed(rank)
    model, local = whole(rank, OPTIMIZERS[name]())
    x, y = samples(8)
    model.fit(x, y, epochs=1, batch_size=4, verbose=0)
    # As if each worker had loaded a checkpoint of its own.
    for variable in [*model.weights, *state(model.optimizer)]:
        if len(variable.shape):
            variable.assign(variable + float(rank))
    before = {id(v): np.array(v) for v in [*model.weights, *state(model.optimizer)]}

    callback = training.BroadcastVariables(root=replicas.size - 1)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_train_batch_end(0)  # when Keras 2 has the state of its optimizers
    own = {id(weight) for layer in local for weight in layer.weights}
    for weight in model.weights:
        if id(weight) in own:
            np.testing.assert_array_equal(np.array(weight), before[id(weight)])
        else:
            same_on_all_ranks(np.array(weight))
    # Kernel and bias of two layers, gamma and beta; as often as the optimizer keeps something.
    slots = {"SGD": 1, "Adam": 3, "scaling the loss": 1, "legacy": 2}[name]
    kept = sum(len(variable.shape) > 0 for variable in state(model.optimizer))
    assert kept == slots * len(model.trainable_variables)
    changed = [v for v in state(model.optimizer) if not np.array_equal(np.array(v), before[id(v)])]
    assert len(changed) <= slots * (len(model.trainable_variables) - 6)
    if rank != replicas.size - 1:
        assert len(changed) == slots * (len(model.trainable_variables) - 6)


@workers.on_one_level
def test_fit_keeps_them_apart_and_the_rest_equal(replicas):
    rank = replicas.rank
    keras.utils.set_random_seed(rank)
    model, local = whole(rank)
    x, y = samples(8 * replicas.size)
    own = slice(8 * rank, 8 * rank + 8)
    callbacks = [training.BroadcastVariables()]
    model.fit(x[own], y[own], epochs=2, batch_size=4, verbose=0, callbacks=callbacks)
    for weight in model.layers[0].get_weights():
        same_on_all_ranks(weight)
    bias = local[0].layers[-1].get_weights()[-1]
    total = syncbn.resolve().all_reduce_sum(tf.constant(bias), "biases").numpy()
    assert not np.allclose(total, replicas.size * bias)
    # What should be the same is; what is each worker's own is not looked at.
    syncbn.assert_synchronized(model)
    syncbn.assert_synchronized(model, weights=True)


@workers.on_one_level
def test_each_of_several_optimizers_has_its_own(replicas):
    model = keras.Sequential([trunk(), keras.layers.BatchNormalization(name="own_norm")])
    model.compile(training.distribute(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    model.build((None, 3))
    own = model.layers[-1]
    own.moving_mean.assign([replicas.rank] * 4)
    with pytest.raises(ValueError, match="Received: another moving_mean of own_norm on rank 1"):
        syncbn.assert_synchronized(model)
    model.critic = training.distribute(keras.optimizers.SGD(0.1), local=own)
    syncbn.assert_synchronized(model)
    average = training.AverageStatistics()
    average.set_model(model)
    average.on_epoch_end(0)
    np.testing.assert_array_equal(own.moving_mean, [replicas.rank] * 4)


@workers.on_one_level
def test_a_step_that_one_worker_must_skip_is_skipped_by_all(replicas):
    inner = keras.optimizers.SGD(1.0)
    shared, own = tf.Variable([1.0]), tf.Variable([1.0])
    optimizer = training.distribute(LossScaleOptimizer(inner), local=own)
    optimizer.build([shared, own])
    last = replicas.rank == replicas.size - 1
    for gradient in np.inf, np.nan, 1.0:
        scale = float(optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale)
        gradients = [tf.constant([scale]), tf.constant([(gradient if last else 1.0) * scale])]
        if KERAS_3:
            optimizer.apply(gradients, [shared, own])
        else:
            gradients = optimizer.get_unscaled_gradients(gradients)
            optimizer.apply_gradients(zip(gradients, [shared, own], strict=True))
        moved = gradient == 1.0
        np.testing.assert_allclose(shared, [1.0 - moved])
        np.testing.assert_allclose(own, [1.0 - moved / replicas.size], rtol=1e-6)


@workers.on_one_level
def test_a_local_variable_may_have_no_gradient(replicas):
    weights = [tf.Variable([0.0]), tf.Variable([0.0])]
    optimizer = training.distribute(LossScaleOptimizer(keras.optimizers.SGD(1.0)), local=weights[1])
    optimizer.build(weights)
    one = tf.constant([float(optimizer.dynamic_scale) if KERAS_3 else 1.0])
    with pytest.warns(UserWarning, match="Gradients do not exist") if KERAS_3 else nullcontext():
        optimizer.apply_gradients(zip([one, None], weights, strict=True))
    np.testing.assert_allclose(weights, [[-1.0], [0.0]])


@workers.on_one_level
def test_variables_are_registered_as_horovod_does(replicas):
    shared, own = tf.Variable([0.0]), tf.Variable([0.0])
    optimizer = training.distribute(keras.optimizers.SGD(1.0))
    optimizer.register_local_var(own)
    gradient = tf.constant([float(replicas.rank)])
    slices = tf.IndexedSlices(gradient, tf.constant([0]), tf.constant([1]))
    optimizer.apply_gradients([(gradient, shared), (slices, own)])
    np.testing.assert_allclose(shared, [-np.mean(range(replicas.size))], rtol=1e-6)
    np.testing.assert_allclose(own, [-replicas.rank / replicas.size], rtol=1e-6)


@pytest.mark.skipif("+" not in ENGINE, reason="one level of replicas")
def test_on_two_levels_they_are_those_of_a_process(replicas):
    with replicas.strategy.scope():
        shared, own = tf.Variable([0.0]), tf.Variable([0.0])
        optimizer = training.distribute(keras.optimizers.SGD(1.0), local=own)
        optimizer.build([shared, own])

    def step():
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradient = tf.cast(replicas.first + number, tf.float32)[tf.newaxis]
        optimizer.apply_gradients([(gradient, shared), (gradient, own)])

    tf.function(lambda: replicas.strategy.run(step))()
    ranks = range(replicas.first, replicas.first + replicas.local_size)
    for variable, ours in (shared, range(replicas.size)), (own, ranks):
        for copy in replicas.strategy.experimental_local_results(variable):
            np.testing.assert_allclose(copy, [-sum(ours) / replicas.processes], rtol=1e-6)


@pytest.mark.skipif(ENGINE != "mirrored", reason="each process has variables of its own")
def test_a_strategy_has_none(replicas):
    with replicas.strategy.scope():
        weight = tf.Variable([1.0])
        optimizer = training.distribute(keras.optimizers.SGD(1.0), local=weight)
        optimizer.build([weight])
    with pytest.raises(RuntimeError, match="Local variables are those of a process"):
        replicas.strategy.run(lambda: optimizer.apply_gradients([(tf.ones([1]), weight)]))
