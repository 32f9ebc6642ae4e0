"""Optimizers that average gradients over separate processes."""

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from tests.keras import KERAS_3, keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import LossScaleOptimizer, kept, same_on_all_ranks

pytestmark = workers.in_separate_processes


def variable(value, name="weight"):
    return (keras.Variable if KERAS_3 else tf.Variable)(value, name=name)


OPTIONS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "weight decay": {"weight_decay": 0.1},
    "EMA": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    **({"accumulation": {"gradient_accumulation_steps": 2}} if KERAS_3 else {}),
    **({"fixed loss scale": {"loss_scale_factor": 8.0}} if KERAS_3 else {}),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("options", kept(OPTIONS, "plain"))
def test_the_optimizer_acts_on_the_mean_gradient(replicas, options, graph):
    steps = 4
    gradients = np.random.default_rng(3).normal(size=(steps, replicas.size, 4, 3))
    ours, theirs = (variable(np.ones((4, 3), "float32")) for _ in range(2))
    optimizers = [keras.optimizers.Adam(0.1, **OPTIONS[options]) for _ in range(2)]
    training.distribute(optimizers[0])
    for optimizer, weight in zip(optimizers, (ours, theirs), strict=True):
        optimizer.build([weight])

    def apply(gradient):
        optimizers[0].apply_gradients([(gradient, ours)])

    apply = tf.function(apply) if graph else apply
    for step in range(steps):
        apply(tf.constant(gradients[step, replicas.rank], tf.float32))
        mean = tf.constant(gradients[step].mean(0), tf.float32)
        optimizers[1].apply_gradients([(mean, theirs)])
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
    same_on_all_ranks(ours.numpy())


def test_gradients_of_all_kinds_travel_together(replicas):
    values = {
        dtype: np.random.default_rng(4).normal(size=(replicas.size, 3)).astype("float32")
        for dtype in ("float16", "bfloat16", "float32", "float64")
    }
    weights = [tf.Variable(tf.zeros([3], dtype)) for dtype in values]
    table, unused = tf.Variable(tf.zeros([5, 2])), tf.Variable(tf.zeros([2]))
    # Rank 0 has seen two rows (one of them twice), rank 1 one, the others none.
    rows = [[4, 1, 4], [1], []][min(replicas.rank, 2)]
    slices = tf.IndexedSlices(tf.ones([len(rows), 2]), tf.constant(rows, tf.int64), [5, 2])
    optimizer = training.distribute(tf.compat.v1.train.GradientDescentOptimizer(1.0))

    @tf.function
    def apply():
        gradients = [tf.cast(value[replicas.rank], dtype) for dtype, value in values.items()]
        pairs = zip([*gradients, slices, None], [*weights, table, unused], strict=True)
        optimizer.apply_gradients(pairs)

    apply()
    for (dtype, value), weight in zip(values.items(), weights, strict=True):
        rtol = {"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-6)
        actual = tf.cast(weight, tf.float64).numpy()
        np.testing.assert_allclose(actual, -value.mean(0), rtol=10 * rtol, atol=rtol)
    expected = np.zeros((5, 2))
    expected[4], expected[1] = -2, -2
    np.testing.assert_allclose(table.numpy(), expected / replicas.size, rtol=1e-6)
    np.testing.assert_array_equal(unused.numpy(), 0)


def test_gradients_of_one_dtype_cost_one_collective(replicas):
    weights = [tf.Variable(tf.zeros([n + 1])) for n in range(5)]
    optimizer = training.distribute(tf.compat.v1.train.GradientDescentOptimizer(1.0))

    @tf.function
    def apply():
        optimizer.apply_gradients([(tf.ones_like(weight), weight) for weight in weights])

    operations = apply.get_concrete_function().graph.get_operations()
    kind = {"horovod": "HorovodGroupedAllreduce", "mpi": "PyFunc"}[ENGINE]
    collectives = [o.type for o in operations if "Allreduce" in o.type or "PyFunc" in o.type]
    assert collectives == [kind]


def test_the_mean_of_float16_gradients_does_not_overflow(replicas):
    weight = tf.Variable(tf.zeros([2], tf.float16))
    optimizer = training.distribute(tf.compat.v1.train.GradientDescentOptimizer(1.0))
    optimizer.apply_gradients([(tf.constant([40000, -8], tf.float16), weight)])
    np.testing.assert_array_equal(weight.numpy(), [-40000, 8])


def test_workers_with_other_gradients_are_told(replicas):
    weights = [tf.Variable(tf.zeros([2])), tf.Variable(tf.zeros([3]))]
    gradients = [tf.ones([2]), None if replicas.rank else tf.ones([3])]
    optimizer = training.distribute(tf.compat.v1.train.GradientDescentOptimizer(1.0))
    with pytest.raises(ValueError, match=r"must have the same gradients.* is number 1;"):
        optimizer.apply_gradients(zip(gradients, weights, strict=True))


def test_an_embedding_is_trained_by_workers_some_of_which_have_no_rows(replicas):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Embedding(5, 3)])
    model.compile(training.distribute(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    rows = 4 if replicas.rank == 0 else 0
    ids = np.random.default_rng(7).integers(0, 5, size=(rows, 2))
    data = tf.data.Dataset.from_tensor_slices((ids, np.ones((rows, 2, 3), "float32"))).batch(2)
    callbacks = [training.BroadcastVariables()]
    model.fit(training.join(data), verbose=0, shuffle=False, callbacks=callbacks)
    (table,) = model.get_weights()
    assert np.isfinite(table).all()
    same_on_all_ranks(table)


def test_all_workers_skip_a_step_whose_gradient_overflows_on_one(replicas):
    weight = variable(np.ones(3, "float32"))
    optimizer = training.distribute(LossScaleOptimizer(keras.optimizers.SGD(1.0)))
    optimizer.build([weight])
    scale = optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale
    before = float(np.asarray(scale))

    @tf.function
    def apply(gradient):
        optimizer.apply_gradients([(gradient, weight)])

    bad = float("inf") if replicas.rank == replicas.size - 1 else 1.0
    apply(tf.fill([3], bad))
    np.testing.assert_array_equal(weight.numpy(), 1)
    scale = optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale
    assert float(np.asarray(scale)) == before / 2
    apply(tf.fill([3], float(replicas.rank)))
    same_on_all_ranks(weight.numpy())
    assert np.isfinite(weight.numpy()).all()
    assert (weight.numpy() != 1).any()


def test_a_loaded_model_goes_on_averaging(replicas, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(training.distribute(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    x = np.random.default_rng(replicas.rank).normal(size=(8, 3)).astype("float32")
    model.fit(x, x[:, :2], verbose=0, callbacks=[training.BroadcastVariables()])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    loaded.fit(x, x[:, :2], verbose=0)
    for weight in loaded.get_weights():
        same_on_all_ranks(weight)
