"""What models are evaluated with, and on what, on every engine: all samples in one place."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit
from syncbn._src.models.training_job import job_of
from tests.keras import KERAS_3, keras
from tests.kinds_of_replicas import Nested, Strategy
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import compiled, samples

BATCH = 4  # of a replica
RATE = 0.1


@pytest.fixture(autouse=True)
def _mended():
    mend_keras_fit()


def scope(replicas):
    """The context in which models, metrics and optimizers are made."""
    return replicas.strategy.scope() if isinstance(replicas, Strategy) else contextlib.nullcontext()


def make(replicas, norm=None, **options):
    """A compiled model, with the same weights on all replicas."""
    keras.utils.set_random_seed(7)
    with scope(replicas):
        return compiled(norm and norm(), **options)


def own_rows(replicas, count):
    """Which rows of each global batch this process trains on."""
    if isinstance(replicas, Nested):
        first, here = replicas.first, replicas.local_size
    elif ENGINE == "mirrored":
        first, here = 0, replicas.size
    elif ENGINE == "multiworker":
        first, here = replicas.strategy.cluster_resolver.task_id, 1
    else:
        first, here = replicas.rank, 1
    rows = np.arange(count).reshape(-1, replicas.size, BATCH)
    return rows[:, first : first + here].ravel()


def of_replica(replicas, x, rank):
    """The rows that a replica trains on, batch by batch."""
    return x.reshape(-1, replicas.size, BATCH, *x.shape[1:])[:, rank]


def fit(model, replicas, x, y, **options):
    """Trains on batches whose r-th part is that of replica r."""
    rows = own_rows(replicas, len(x))
    data = tf.data.Dataset.from_tensor_slices((x[rows], y[rows]))
    if ENGINE == "multiworker":
        own = data.batch(BATCH).repeat()
        data = replicas.strategy.distribute_datasets_from_function(lambda context: own)
        options["steps_per_epoch"] = len(rows) // BATCH
    else:
        policy = tf.data.Options()
        policy.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        here = getattr(replicas, "local_size", 1)
        data = data.batch(BATCH * here).with_options(policy)
    return model.fit(data, verbose=0, shuffle=False, **options)


def cross_entropy(outputs, y):
    p = np.float64(outputs)
    return -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))


def inputs_of_the_norm(weights, x):
    """What the normalization of `compiled` sees, in float64."""
    return np.float64(x) @ weights[0] + weights[1]


# Evaluation


def test_evaluate_gives_the_numbers_of_all_samples(replicas):
    x, y = samples(37 * 5)
    with scope(replicas):
        metrics = ["accuracy", keras.metrics.AUC(name="auc")]
        model = make(replicas, keras.layers.BatchNormalization, metrics=metrics)
    # The truth for AUC, which is no mean, is one process with all samples.
    alone = compiled(
        keras.layers.BatchNormalization(),
        optimizer=keras.optimizers.SGD(0.1),
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
        run_eagerly=True,
    )
    alone.set_weights(model.get_weights())
    separate = workers.across(replicas)
    parts = np.split(np.arange(len(x)), [11 * (rank + 1) for rank in range(separate.size - 1)])
    own = parts[separate.rank]
    found = training.evaluate(model, x[own], y[own], batch_size=8)
    outputs = alone.predict(x, verbose=0)
    assert found["loss"] == pytest.approx(cross_entropy(outputs, y), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean((outputs > 0.5) == y), rel=1e-6)
    expected = alone.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    assert list(found) == list(expected)
    assert found["auc"] == pytest.approx(expected["auc"], rel=1e-5)
    rows = all_gather(job_of(model).workers(), np.array([*found.values()]), "compare")
    assert (rows == rows[0]).all()
    # The metrics themselves are as after the worker's own evaluation.
    if separate.size > 1:
        theirs = {name: float(value) for name, value in model.get_metrics_result().items()}
        alone.evaluate(x[own], y[own], batch_size=8, verbose=0)
        ours = {name: float(value) for name, value in alone.get_metrics_result().items()}
        assert theirs == pytest.approx(ours, rel=1e-5)


@workers.in_separate_processes
def test_what_a_test_step_returns_besides_metrics_is_averaged(replicas):
    class Own(keras.Model):
        def test_step(self, data):
            return {"rank": data[0]}

    rank = workers.across(replicas).rank
    inputs = keras.Input(())
    model = Own(inputs, inputs)
    model.compile(jit_compile=False)
    data = tf.data.Dataset.from_tensors((tf.constant(float(rank)), tf.constant(0.0)))
    assert training.evaluate(model, data) == {"rank": 0.5 * (workers.across(replicas).size - 1)}


# What Keras 3 says of a dataset of unknown length that ends, or begins with its end.
keras_says_so = pytest.mark.filterwarnings("ignore:Your input ran out of data")


@keras_says_so
@workers.in_separate_processes
def test_an_evaluation_that_fails_on_one_worker_fails_on_all(replicas):
    across = workers.across(replicas)
    last = across.size - 1
    x, y = samples(8)
    model = make(replicas)

    def rows():
        yield x, y
        if across.rank == last:
            raise OSError("the disk is gone")

    data = tf.data.Dataset.from_generator(rows, output_signature=(spec(x), spec(y)))
    own = (
        (tf.errors.OpError, "the disk is gone")
        if across.rank == last
        else (RuntimeError, f"{last}")
    )
    with pytest.raises(own[0], match=own[1]):
        training.evaluate(model, data)


def spec(array):
    return tf.TensorSpec([None, *array.shape[1:]], array.dtype)


@keras_says_so
@workers.in_separate_processes
def test_a_worker_without_a_batch_is_told_to_join(replicas):
    across = workers.across(replicas)
    last = across.size - 1
    x, y = samples(8)
    model = make(replicas)
    expected = cross_entropy(model.predict(x, verbose=0), y)
    own = slice(0, 0 if across.rank == last else 8)
    data = tf.data.Dataset.from_tensor_slices((x[own], y[own])).batch(4)
    error = ValueError if across.rank == last else RuntimeError
    with pytest.raises(error):
        training.evaluate(model, data)
    found = training.evaluate(model, training.join(data))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


# Averages of moving statistics


def test_plain_statistics_are_averaged_before_validation(replicas):
    x, y = samples(3 * BATCH * replicas.size)
    x = x * np.arange(1, len(x) + 1, dtype="float32")[:, None]  # replicas see other statistics
    model = make(
        replicas,
        lambda: keras.layers.BatchNormalization(momentum=0.5),
        optimizer=training.distribute(keras.optimizers.SGD(0.0)),
    )
    before = model.get_weights()
    layer = model.layers[-2]
    average = training.AverageStatistics()
    validation = samples(6)
    if ENGINE == "multiworker":
        # It is shared out, and Keras wants a batch for each.
        validation = tf.data.Dataset.from_tensor_slices(validation).batch(6)
    history = fit(
        model, replicas, x, y, epochs=1, validation_data=validation, callbacks=[average]
    ).history
    moving = []
    for rank in range(replicas.size):
        mean, variance = np.zeros(4), np.ones(4)
        for batch in of_replica(replicas, x, rank):
            seen = inputs_of_the_norm(before, batch)
            mean, variance = (mean + seen.mean(0)) / 2, (variance + seen.var(0)) / 2
        moving.append((mean, variance))
    across = job_of(model).workers()
    for name, expected in zip(
        ("moving_mean", "moving_variance"), np.mean(moving, axis=0), strict=True
    ):
        copies = list(replicas.moving([layer])[name].values())
        np.testing.assert_allclose(copies[0], expected, rtol=1e-4)
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])
        rows = all_gather(across, np.float64(copies[0]), "compare")
        assert (rows == rows[0]).all()
    outputs = model.predict(samples(6)[0], verbose=0)
    assert history["val_loss"][0] == pytest.approx(cross_entropy(outputs, samples(6)[1]), rel=1e-4)


@workers.in_separate_processes
def test_statistics_that_are_local_are_not_averaged(replicas):
    model = make(replicas, keras.layers.BatchNormalization)
    layer = model.layers[-2]
    across = workers.across(replicas)
    own = [np.full(4, value + across.rank, "float32") for value in (1, 0, 2, 3)]
    layer.set_weights(own)
    optimizer = training.distribute(keras.optimizers.SGD(0.0), local=layer)
    model.compile(optimizer, "mse", jit_compile=False)
    callback = training.AverageStatistics()
    callback.set_model(model)
    callback.on_epoch_end(0)
    for ours, theirs in zip(layer.get_weights(), own, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    model.compile(training.distribute(keras.optimizers.SGD(0.0)), "mse", jit_compile=False)
    callback.on_epoch_end(0)
    middle = (across.size - 1) / 2
    np.testing.assert_array_equal(layer.moving_mean, np.full(4, 2 + middle))
    np.testing.assert_array_equal(layer.moving_variance, np.full(4, 3 + middle))


# Recalibration in fit


class SwapAverages(keras.callbacks.Callback):
    """What `SwapEMAWeights` of Keras 3 does, with averages of its own: for Keras 2."""

    def __init__(self):
        super().__init__()
        self.averages = None

    def on_train_batch_end(self, batch, logs=None):
        own = [weight.numpy() for weight in self.model.trainable_variables]
        pairs = zip(self.averages or own, own, strict=True)
        self.averages = [(average + weight) / 2 for average, weight in pairs]

    def on_test_begin(self, logs=None):
        self.trained = [weight.numpy() for weight in self.model.trainable_variables]
        self._assign(self.averages)

    def on_test_end(self, logs=None):
        self._assign(self.trained)

    def _assign(self, values):
        for weight, value in zip(self.model.trainable_variables, values, strict=True):
            weight.assign(value)


class Watch(keras.callbacks.Callback):
    """Keeps the weights that are trained, evaluated and left, and the averages by definition."""

    def __init__(self):
        super().__init__()
        self.averages, self.trained, self.evaluated, self.saved = None, [], [], []

    def on_train_batch_end(self, batch, logs=None):
        own = [np.float64(weight.numpy()) for weight in self.model.trainable_variables]
        pairs = zip(self.averages or own, own, strict=True)
        self.averages = [(average + weight) / 2 for average, weight in pairs]

    def on_test_begin(self, logs=None):
        self.evaluated.append((self.averages, self.model.get_weights()))

    def on_test_end(self, logs=None):
        self.trained.append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.saved.append(self.model.get_weights())


def own_part(replicas, x):
    """Ragged parts for the workers."""
    across = workers.across(replicas)
    ends = [5 * (rank + 1) for rank in range(across.size - 1)]
    return np.split(x, ends)[across.rank]


def require_statistics_of(weights, x):
    """Compares the statistics among a model's weights with those of the others, in float64."""
    kernel, bias, _, _, mean, variance, *_ = weights
    seen = inputs_of_the_norm([kernel, bias], x)
    np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, seen.var(0), rtol=1e-4, atol=1e-5)


def averaging(replicas):
    """A model whose optimizer averages its weights, and the callback that evaluates those."""
    options = {"use_ema": True, "ema_momentum": 0.5} if KERAS_3 else {}
    with scope(replicas):
        optimizer = keras.optimizers.SGD(RATE, momentum=0.9, **options)
        model = make(replicas, optimizer=training.distribute(optimizer))
    return model, keras.callbacks.SwapEMAWeights if KERAS_3 else SwapAverages


def fit_watched(replicas, model, *callbacks, validate=True, epochs=2):
    x, y = samples(3 * BATCH * replicas.size)
    options = {}
    if validate:
        data = tf.data.Dataset.from_tensor_slices(samples(8)).batch(8)
        options["validation_data"] = data
    watch = Watch()
    fit(model, replicas, x, y, epochs=epochs, callbacks=[*callbacks, watch], **options)
    return watch


def test_averaged_weights_are_evaluated_with_their_own_statistics(replicas):
    model, swap = averaging(replicas)
    x = samples(31)[0]
    recalibrate = training.Recalibrate([own_part(replicas, x)], every=1)
    watch = fit_watched(replicas, model, swap(), recalibrate)
    assert len(watch.evaluated) == 2
    for (averages, evaluated), trained in zip(watch.evaluated, watch.trained, strict=True):
        # The evaluated weights are the averages, by their definition, and not those trained.
        for ours, theirs in zip(evaluated[:2], averages[:2], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert np.abs(trained[0] - evaluated[0]).max() > 1e-3
        require_statistics_of(evaluated, x)
        # What is trained has its own statistics again.
        assert not np.allclose(trained[4], evaluated[4], rtol=1e-3)
    for saved, trained in zip(watch.saved, watch.trained, strict=True):
        for ours, theirs in zip(saved, trained, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    require_statistics_of(model.get_weights(), x)
    layer = model.layers[-2]
    for copies in replicas.moving([layer]).values():
        first, *others = copies.values()
        for copy in others:
            np.testing.assert_array_equal(copy, first)


@pytest.mark.arithmetic
@pytest.mark.skipif(not KERAS_3, reason="SwapEMAWeights is of Keras 3")
@pytest.mark.parametrize("validate", [False, True])
def test_averaged_weights_are_saved_with_their_own_statistics(validate, replicas):
    model, swap = averaging(replicas)
    x = samples(31)[0]
    recalibrate = training.Recalibrate([own_part(replicas, x)], every=1)
    watch = fit_watched(
        replicas, model, swap(swap_on_epoch=True), recalibrate, validate=validate, epochs=3
    )
    for saved in watch.saved:
        require_statistics_of(saved, x)
    require_statistics_of(model.get_weights(), x)


@pytest.mark.arithmetic
def test_callbacks_in_the_other_order_are_an_error(replicas):
    model, swap = averaging(replicas)
    recalibrate = training.Recalibrate([own_part(replicas, samples(31)[0])], every=1)
    message = r"changed behind it, in on_test_begin\. Put it behind"
    with pytest.raises(RuntimeError, match=message):
        fit_watched(replicas, model, recalibrate, swap())
    if KERAS_3:
        model, swap = averaging(replicas)
        message = r"changed behind it, in on_epoch_begin\. Put it behind"
        with pytest.raises(RuntimeError, match=message):
            fit_watched(replicas, model, recalibrate, swap(swap_on_epoch=True), validate=False)


def test_trained_weights_are_recalibrated_in_every_second_epoch_and_at_the_end(replicas):
    model = make(replicas)
    x = samples(31)[0]
    recalibrate = training.Recalibrate([own_part(replicas, x)], every=2)
    watch = fit_watched(replicas, model, recalibrate, epochs=3)
    with pytest.raises(AssertionError):
        require_statistics_of(watch.evaluated[0][1], x)
    require_statistics_of(watch.evaluated[1][1], x)
    require_statistics_of(watch.saved[1], x)
    with pytest.raises(AssertionError):
        require_statistics_of(watch.saved[2], x)
    require_statistics_of(model.get_weights(), x)


def test_evaluation_outside_of_fit_is_recalibrated_too(replicas):
    model = make(replicas)
    x, y = samples(8 * replicas.size)
    watch = Watch()
    recalibrate = training.Recalibrate([own_part(replicas, x)])
    training.evaluate(model, x, y, callbacks=[recalibrate, watch])
    require_statistics_of(watch.evaluated[0][1], x)


def test_evaluation_after_a_fit_that_was_interrupted_is_recalibrated_too(replicas):
    model = make(replicas)
    x, y = samples(2 * BATCH * replicas.size)
    watch = Watch()
    recalibrate = training.Recalibrate([own_part(replicas, x)])

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, replicas, x, y, callbacks=[recalibrate, Interrupt()])
    training.evaluate(model, x, y, callbacks=[recalibrate, watch])
    require_statistics_of(watch.evaluated[0][1], x)


# Callbacks of one worker


def test_callbacks_of_rank_zero(replicas, tmp_path):
    callback = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    rank = replicas.strategy.cluster_resolver.task_id if ENGINE == "multiworker" else None
    rank = workers.across(replicas).rank if rank is None else rank
    expected = [callback] if rank == 0 else []
    assert training.rank_zero_only(callback) == expected
    if isinstance(replicas, Strategy):
        with replicas.strategy.scope():
            assert training.rank_zero_only(callback) == expected
    reading = [
        keras.callbacks.ModelCheckpoint(str(tmp_path / "model.keras")),
        keras.callbacks.TensorBoard(str(tmp_path), histogram_freq=1),
        keras.callbacks.TensorBoard(str(tmp_path), embeddings_freq=1),
    ]
    for one in reading:
        if ENGINE == "multiworker":
            with pytest.raises(ValueError, match=f"{type(one).__name__} for rank 0 only"):
                training.rank_zero_only(one)
        else:
            assert training.rank_zero_only(callback, one) == (expected and [callback, one])
    curves = keras.callbacks.TensorBoard(str(tmp_path))
    assert training.rank_zero_only(curves) == (expected and [curves])
    x, y = samples(BATCH * replicas.size)
    fit(make(replicas), replicas, x, y, callbacks=training.rank_zero_only(callback))
    assert (tmp_path / "log.csv").exists() == (rank == 0)


# The start of a job


@workers.on_one_level
def test_a_start_finds_the_engine_that_is_initialized(replicas):
    job = training.start(seed=5)
    assert (job.engine, job.rank, job.size) == (ENGINE, replicas.rank, replicas.size)
    assert job.local_rank == job.rank  # all on one machine
    drawn = np.random.random(), float(tf.random.uniform([]))
    rows = all_gather(syncbn.resolve(), np.array(drawn), "drawn")
    assert len({*rows[:, 0]}) == len({*rows[:, 1]}) == job.size
    keras.utils.set_random_seed(5 + job.rank)
    assert drawn == (np.random.random(), float(tf.random.uniform([])))
    data = job.shard(tf.data.Dataset.range(7))
    assert [int(one) for one in data] == list(range(job.rank, 7, job.size))
    # Whatever order each goes through them in, the shares are all of the data, each element once.
    for shuffled in data.shuffle(7), data.shuffle(7, seed=3):
        own = np.zeros(7)
        np.add.at(own, [int(one) for one in shuffled], 1)
        total = syncbn.resolve().all_reduce_sum(tf.constant(own), "shares").numpy()
        np.testing.assert_array_equal(total, np.ones(7))
    assert training.start(ENGINE) == job
