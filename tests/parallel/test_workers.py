"""What training in separate processes needs: averaged gradients, broadcasts, metrics, joined data.

Under tf.distribute Keras does all of this itself.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from tests.keras import KERAS_3, keras
from tests.parallel.conftest import ENGINE

pytestmark = pytest.mark.skipif(
    ENGINE in ("mirrored", "multiworker"), reason="tf.distribute has this built in"
)

if KERAS_3:
    LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
else:
    LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer


def variable(value, name="weight"):
    return (keras.Variable if KERAS_3 else tf.Variable)(value, name=name)


def same_on_all_ranks(value):
    """Compares arrays over the ranks: their sum is ``size`` times each rank's own."""
    value = np.asarray(value, np.float64)
    communicator = syncbn.resolve()
    total = communicator.all_reduce_sum(tf.constant(value), "compare").numpy()
    squares = communicator.all_reduce_sum(tf.constant(value**2), "compare").numpy()
    np.testing.assert_allclose(total, communicator.size * value, rtol=1e-12)
    np.testing.assert_allclose(squares, communicator.size * value**2, rtol=1e-12)


# --------------------------------------------------------------------------------------- distribute

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
@pytest.mark.parametrize("options", OPTIONS)
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


# ----------------------------------------------------------------------------------- broadcast, fit


def test_broadcast_gives_all_workers_the_values_of_one(replicas):
    def values(rank):
        return [
            np.full((2, 3), rank, "float32"),
            np.array(2**60 + rank, "int64"),
            np.array([rank == 0, True]),
            np.array([rank, 1.5, np.inf], "float16"),
            np.array([rank, np.nan], "float64"),
        ]

    variables = [tf.Variable(value) for value in values(replicas.rank)]
    root = replicas.size - 1
    training.broadcast({"nested": variables}, root=root)
    for ours, theirs in zip(variables, values(root), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_workers_with_different_models_are_told(replicas):
    odd = replicas.size - 1
    own = [tf.Variable(tf.zeros([2])), tf.Variable(tf.zeros([3 + (replicas.rank == odd)]))]
    with pytest.raises(ValueError, match=rf"on rank {odd} than on rank 0.* is number 1;"):
        training.broadcast(own)
    with pytest.raises(ValueError, match=rf"on rank {odd} than on rank 0.* is number 1;"):
        training.broadcast(own[: 1 + (replicas.rank != odd)])
    with pytest.raises(ValueError, match=f"Received: root={replicas.size}"):
        training.broadcast(own, root=replicas.size)


def compiled(norm=None, **options):
    layers = [keras.Input((3,)), keras.layers.Dense(4), norm or syncbn.SyncBatchNormalization()]
    model = keras.Sequential([*layers, keras.layers.Dense(1, activation="sigmoid")])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(
        options.pop("optimizer", None) or training.distribute(optimizer),
        "binary_crossentropy",
        jit_compile=False,
        **options,
    )
    return model


def samples(count):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(count, 3)).astype("float32")
    return x, (x.sum(1, keepdims=True) > rng.normal(size=(count, 1))).astype("float32")


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
    )
    alone.set_weights(model.get_weights())
    expected = alone.evaluate(x, y, verbose=0, return_dict=True)
    assert set(history) == {*expected, *(f"val_{name}" for name in expected)}
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(history[f"val_{name}"], value, rtol=1e-5, err_msg=name)


# --------------------------------------------------------------------------------------------- join


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_joined_dataset_is_as_long_as_the_longest(replicas, known):
    own = [7, 4, 0][replicas.rank % 3]
    dataset = tf.data.Dataset.range(2 * own).map(
        lambda i: {
            "x": (tf.fill([3], i), tf.ragged.range(tf.fill([2], i % 3))),
            "y": tf.as_string(i),
        }
    )
    dataset = dataset.batch(2)
    dataset = dataset if known else dataset.filter(lambda element: True)
    joined = training.join(dataset)
    assert int(joined.cardinality()) == (7 if known else tf.data.UNKNOWN_CARDINALITY)
    for _ in range(2):  # a dataset can be gone through again
        elements = list(joined)
        sizes = [int(element["y"].shape[0]) for element in elements]
        assert sizes == [2] * own + [0] * (7 - own)
        seen = [text for element in elements for text in element["y"].numpy().tolist()]
        assert seen == [str(i).encode() for i in range(2 * own)]


class Pair(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    "structure", [lambda i: (i,), lambda i: Pair(i, {"a": i}), lambda i: ((i, i), {"b": (i,)})]
)
def test_any_structure_is_joined(replicas, structure):
    dataset = tf.data.Dataset.range(3 + replicas.rank).map(structure).batch(2)
    joined = training.join(dataset.filter(lambda *element: True))
    assert joined.element_spec == dataset.element_spec
    assert len(list(joined)) == (3 + replicas.size) // 2


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


def test_an_early_end_leaves_nothing_half_done(replicas):
    dataset = tf.data.Dataset.range(4 + replicas.rank).batch(1).filter(lambda element: True)
    joined = training.join(dataset)
    for _ in range(3):
        assert len(list(joined.take(2))) == 2
    assert len(list(joined)) == 3 + replicas.size


# What Keras 3 says after the first epoch of any dataset of unknown length, and of an empty one.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_ragged_job_is_the_job_of_one_process(replicas, known):
    """Workers with 7, 4 and 0 batches; what they do together, one process does batch by batch."""
    lengths = [7, 4, 0][: replicas.size]
    x, y = samples(3 * sum(lengths))
    parts = np.split(np.arange(len(x)), np.cumsum([3 * n for n in lengths])[:-1])
    own = parts[replicas.rank]
    dataset = tf.data.Dataset.from_tensor_slices((x[own], y[own])).batch(3)
    dataset = dataset if known else dataset.filter(lambda *element: True)
    keras.utils.set_random_seed(0)
    model = compiled()
    weights = model.get_weights()
    model.fit(
        training.join(dataset, sample_weight=True),
        epochs=2,
        verbose=0,
        shuffle=False,
        callbacks=[training.BroadcastVariables()],
    )

    alone = compiled(keras.layers.BatchNormalization(), optimizer=keras.optimizers.SGD(0.1, 0.9))
    alone.set_weights(weights)
    for _ in range(2):
        for step in range(7):
            together = np.concatenate([part[3 * step : 3 * step + 3] for part in parts])
            alone.train_on_batch(x[together], y[together])
    for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        same_on_all_ranks(ours)


def test_join_says_what_it_cannot_take(replicas):
    with pytest.raises(TypeError, match=r"Call \.batch"):
        training.join(tf.data.Dataset.range(3))
    with pytest.raises(TypeError, match=r"must be a tf\.data\.Dataset"):
        training.join([1, 2])
    with pytest.raises(ValueError, match=r"needs elements \(x, y\)"):
        training.join(tf.data.Dataset.range(3).batch(1), sample_weight=True)
