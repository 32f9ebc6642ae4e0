"""Several backward passes for one step: one exchange, and the numbers of one process."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import KERAS_3, keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import (
    Counting,
    LossScaleOptimizer,
    kept,
    same_on_all_ranks,
    samples,
)


def build(norm):
    # Without a bias, whose gradient is zero before a normalization, and Adam takes rounding for it.
    dense = keras.layers.Dense(4, use_bias=False)
    return keras.Sequential([keras.Input((3,)), dense, norm, keras.layers.Dense(1)])


def gradients_of(model, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables)


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam, clipped": lambda: keras.optimizers.Adam(0.02, global_clipnorm=0.5),
    "scaling the loss": lambda: LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
}
if not KERAS_3:
    OPTIMIZERS["legacy"] = lambda: keras.optimizers.legacy.SGD(0.05, momentum=0.9)


@workers.on_one_level
# Each optimizer both ways, once in a graph.
@pytest.mark.parametrize(
    ("name", "mean", "graph"),
    kept(
        [(name, mean, mean ^ (name == "SGD")) for name in OPTIMIZERS for mean in (False, True)],
        ("SGD", False, True),
        ("SGD", True, False),
    ),
)
def test_the_weights_are_those_of_one_process_with_all_passes(replicas, name, mean, graph):
    passes, steps, rows = 3, 2, 4
    x, y = samples(rows * replicas.size * passes * steps)
    x, y = (part.reshape(steps * passes, replicas.size, rows, -1) for part in (x, y))
    keras.utils.set_random_seed(0)
    model, alone = build(syncbn.SyncBatchNormalization()), build(keras.layers.BatchNormalization())
    alone.set_weights(model.get_weights())
    optimizer = training.distribute(
        OPTIMIZERS[name](), backward_passes_per_step=passes, average_aggregated_gradients=mean
    )

    def one_pass(x, y):
        gradients = gradients_of(model, x, y)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = tf.function(one_pass) if graph else one_pass
    theirs = OPTIMIZERS[name]()
    for number in range(steps):
        sums = 0.0
        for index in range(number * passes, (number + 1) * passes):
            before = model.trainable_variables[0].numpy()
            step(tf.constant(x[index, replicas.rank]), tf.constant(y[index, replicas.rank]))
            moved = not np.array_equal(before, model.trainable_variables[0])
            assert moved == ((index + 1) % passes == 0)
            whole = x[index].reshape(-1, 3), y[index].reshape(-1, 1)
            own = [g.numpy().astype("float64") for g in gradients_of(alone, *whole)]
            sums = [a + b for a, b in zip(own, sums or [0.0] * len(own), strict=True)]
        totals = [tf.constant(g / (passes if mean else 1), tf.float32) for g in sums]
        theirs.apply_gradients(zip(totals, alone.trainable_variables, strict=True))
    # What is counted are steps.
    assert int(optimizer.iterations) == int(theirs.iterations) == steps
    for ours, truth in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(ours)


@workers.on_one_level
def test_there_is_one_exchange_for_each_step(replicas):
    counting = Counting(syncbn.resolve())
    optimizer = training.distribute(keras.optimizers.SGD(1.0), counting, backward_passes_per_step=4)
    weights = [tf.Variable([0.0, 0.0]), tf.Variable(0.0)]
    for number in range(8):
        gradients = [tf.constant([1.0, replicas.rank]), tf.constant(0.5)]
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        of_gradients = [name for name in counting.calls if "gradients" in name]
        assert len(of_gradients) == (number + 1) // 4
    mean = np.mean(range(replicas.size))
    np.testing.assert_allclose(weights[0], [-8.0, -8.0 * mean], rtol=1e-6)
    np.testing.assert_allclose(weights[1], -4.0, rtol=1e-6)


@workers.on_one_level
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("mean", kept([False, True], True), ids=["sum", "mean"])
def test_sparse_gradients_stay_sparse(replicas, mean, graph):
    # The rows of each pass, of which some are the same; workers have different numbers of them.
    rows = [[4, 1, 4], [1] * replicas.rank, [0, replicas.rank]]
    table = tf.Variable(tf.zeros([7, 2]))
    seen = []

    class Noting(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars, *args, **kwargs):
            grads_and_vars = list(grads_and_vars)
            seen.extend(type(gradient) for gradient, _ in grads_and_vars)
            return super().apply_gradients(grads_and_vars, *args, **kwargs)

    optimizer = training.distribute(
        (keras.optimizers.SGD if KERAS_3 else Noting)(1.0),
        backward_passes_per_step=3,
        average_aggregated_gradients=mean,
    )

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def one_pass(indices):
        slices = tf.IndexedSlices(tf.ones([tf.shape(indices)[0], 2]), indices, tf.constant([7, 2]))
        optimizer.apply_gradients([(slices, table)])

    for _ in range(2):
        for indices in rows:
            (one_pass if graph else one_pass.python_function)(tf.constant(indices, tf.int32))
    count = sum(
        np.bincount([4, 1, 4] + [1] * rank + [0, rank], minlength=7)
        for rank in range(replicas.size)
    )
    truth = -2 * count / replicas.size / (3 if mean else 1)
    np.testing.assert_allclose(table, np.stack([truth, truth], 1), rtol=1e-6)
    assert KERAS_3 or set(seen) == {tf.IndexedSlices}


@workers.on_one_level
def test_fit_accumulates(replicas):
    x, y = samples(24 * replicas.size)
    own = slice(24 * replicas.rank, 24 * replicas.rank + 24)
    keras.utils.set_random_seed(replicas.rank)
    model = build(syncbn.SyncBatchNormalization())
    optimizer = training.distribute(keras.optimizers.Adam(0.01), backward_passes_per_step=3)
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(
        x[own],
        y[own],
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[training.BroadcastVariables()],
    )
    assert int(optimizer.iterations) == 2 * 24 // 4 // 3
    for weight in model.get_weights():
        same_on_all_ranks(weight)


@workers.on_one_level
def test_other_gradients_in_a_later_pass_are_refused(replicas):
    optimizer = training.distribute(keras.optimizers.SGD(1.0), backward_passes_per_step=2)
    weights = [tf.Variable([0.0]), tf.Variable([0.0])]
    gradients = [tf.ones([1]), tf.ones([1])]
    optimizer.apply_gradients(zip(gradients, weights, strict=True))
    with pytest.raises(ValueError, match=r"must have the same gradients.*is number 1"):
        optimizer.apply_gradients(zip([tf.ones([1]), None], weights, strict=True))
    with pytest.raises(ValueError, match=r"of the same variables.*as number 0 one of"):
        optimizer.apply_gradients(zip(gradients, weights[::-1], strict=True))


@pytest.mark.skipif("mirrored" not in ENGINE, reason="one replica in each process")
def test_several_replicas_are_refused(replicas):
    with replicas.strategy.scope():
        weight = tf.Variable([1.0])
        optimizer = training.distribute(keras.optimizers.SGD(1.0), backward_passes_per_step=2)
        optimizer.build([weight])
    with pytest.raises(NotImplementedError, match="needs one replica in each process"):
        replicas.strategy.run(lambda: optimizer.apply_gradients([(tf.ones([1]), weight)]))
