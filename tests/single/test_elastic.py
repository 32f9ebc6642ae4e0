"""The state of elastic jobs in one process; tests/launchers/test_elastic.py has such jobs."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.communicators.horovod_errors import is_lost_collective, note_collective
from syncbn._src.communicators.launcher import require_whole_job
from syncbn._src.keras_compat.optimizer_state import current_rate, optimizer_variables
from syncbn._src.training import state_commits
from syncbn._src.training.gradient_averages import average_gradients
from tests.keras import KERAS_3, keras
from tests.two_optimizers import TwoOptimizers

STEPS = 6


def built(optimizer=None):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(optimizer or keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    return model


def fit_rest_of_epoch(model, data, state, batches_per_commit, *callbacks):
    """Trains on what an elastic state says is left of its epoch, and commits."""
    model.fit(
        data.skip(state.batch),
        initial_epoch=state.epoch,
        epochs=state.epoch + 1,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, training.CommitState(state, batches_per_commit)],
    )


def batches(steps=STEPS):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8 * steps, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x.sum(1, keepdims=True)))
    return data.batch(8)


def values(model):
    return [one.numpy() for one in (*model.weights, *optimizer_variables(model.optimizer))]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_restored_is_what_was_committed():
    model = built()
    state = training.ElasticState(model, losses=[])
    model.fit(batches(), shuffle=False, verbose=0)
    committed = values(model)
    state.losses.append(0.5)
    state.epoch = 1
    state.commit()
    model.fit(batches(), shuffle=False, verbose=0)
    state.losses.append(0.25)
    state.epoch, state.batch = 2, 3
    state.restore()
    assert_same(values(model), committed)
    assert (state.epoch, state.batch, state.losses) == (1, 0, [0.5])


def test_all_optimizers_of_a_model_are_committed_and_restored():
    def of_all(model):
        first, last = map(optimizer_variables, [model.of_first, *model.others])
        return [one.numpy() for one in (*model.weights, *first, *last)]

    model = TwoOptimizers()
    model.compile(keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1), build=False)
    with pytest.raises(ValueError, match=r"of_first, of Adam, which is not built"):
        training.ElasticState(model)
    model.compile(model.of_first, model.others[0])
    state = training.ElasticState(model)
    model.fit(batches(), shuffle=False, verbose=0)
    committed = of_all(model)
    state.commit()
    model.fit(batches(), shuffle=False, verbose=0)
    state.restore()
    assert_same(of_all(model), committed)


class Lost(Exception):  # noqa: N818
    """A worker, in the middle of an epoch."""


class LoseAWorker(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            raise Lost


def test_fit_that_is_interrupted_comes_to_what_it_would_have_come_to():
    undisturbed = built()
    undisturbed.fit(batches(), epochs=3, shuffle=False, verbose=0)

    model = built()
    state, calls = training.ElasticState(model), []

    def train():
        while state.epoch < 3:
            calls.append((state.epoch, state.batch))
            lose = [LoseAWorker()] * (len(calls) == 2)
            fit_rest_of_epoch(model, batches(), state, 3, *lose)

    with pytest.raises(Lost):
        train()
    state.restore()
    train()
    # The second epoch has lost two of its five steps, and goes on from the third.
    assert calls == [(0, 0), (1, 0), (1, 3), (2, 0)]
    for ours, theirs in zip(values(model), values(undisturbed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no SwapEMAWeights")
def test_averages_that_are_put_into_the_model_behind_a_commit_are_not_committed():
    def fit(model, state, *callbacks):
        averages = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        callbacks = [*callbacks, training.CommitState(state, 4), averages]
        epochs = {"initial_epoch": state.epoch, "epochs": 3}
        model.fit(batches(4), **epochs, shuffle=False, verbose=0, callbacks=callbacks)

    def lose(epoch, logs):
        if epoch == 2:
            raise Lost

    def made():
        return built(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8))

    undisturbed, model = made(), made()
    fit(undisturbed, training.ElasticState(undisturbed))
    state = training.ElasticState(model)
    with pytest.raises(Lost):
        fit(model, state, keras.callbacks.LambdaCallback(on_epoch_begin=lose))
    state.restore()
    assert (state.epoch, state.batch) == (2, 0)
    fit(model, state)
    for ours, theirs in zip(model.get_weights(), undisturbed.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_epochs_and_batches_are_counted_and_committed():
    model, committed = built(), []
    state = training.ElasticState(model)
    state.commit = lambda: committed.append((state.epoch, state.batch))
    commit = training.CommitState(state, batches_per_commit=2)
    model.fit(batches(5), epochs=2, shuffle=False, verbose=0, callbacks=[commit])
    # Not after the last batch of an epoch, but at its end.
    assert committed == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_job_that_changes_at_each_commit_loses_nothing(known):
    def data():
        found = batches(4).filter(lambda x, y: True)
        return found.apply(tf.data.experimental.assert_cardinality(4)) if known else found

    # Not Adam, in which the number of steps matters: Keras 2 counts one more where data end.
    undisturbed = built(keras.optimizers.SGD(0.1, momentum=0.9))
    undisturbed.fit(data(), epochs=2, shuffle=False, verbose=0)

    model, committed = built(keras.optimizers.SGD(0.1, momentum=0.9)), []
    state = training.ElasticState(model)

    def commit():
        training.ElasticState.commit(state)
        committed.append((state.epoch, state.batch))
        raise Lost

    state.commit = commit
    while state.epoch < 2:
        with contextlib.suppress(Lost):
            fit_rest_of_epoch(model, data(), state, 2)
    # Keras begins a batch behind the last one, where it does not know that this was the last.
    assert committed == ([(0, 2), (1, 0), (1, 2), (2, 0)] if known else [(1, 0), (2, 0)])
    for ours, theirs in zip(model.get_weights(), undisturbed.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_that_nothing_is_committed_within_an_epoch_is_said_once(caplog):
    state_commits._say_once.cache_clear()
    commit = training.CommitState(training.ElasticState(built()))
    for steps in None, None, 3:
        commit.set_params({"steps": steps})
        commit.on_epoch_begin(0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the length of the data is unknown" in caplog.text


def test_a_fit_that_begins_at_another_epoch_is_committed_at_that():
    model, committed = built(), []
    state = training.ElasticState(model, batch=1)
    state.commit = lambda: committed.append((state.epoch, state.batch))
    callbacks = [training.CommitState(state, batches_per_commit=2)]
    model.fit(batches(3), initial_epoch=3, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
    assert committed == [(3, 2), (4, 0)]


class Workers:
    """A communicator of so many workers, none of which is asked."""

    name, supports_jit, rank = "tf.distribute", False, 0

    def __init__(self, size):
        self.size = size

    def all_reduce_sum(self, tensor, name):
        raise AssertionError("these have no gradients to add up")


class Rates(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(current_rate(self.model.optimizer))


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_the_rate_goes_on_within_an_epoch_and_follows_the_size(known):
    model, seen = built(keras.optimizers.SGD(0.01, momentum=0.9)), Rates()

    def rates(size, epoch, batch=0, epochs=1):
        options = {"communicator": Workers(size), "first_batch": batch}
        if not known:
            options["steps_per_epoch"] = STEPS
        warmup = training.LearningRateWarmup(0.1, warmup_epochs=2, **options)
        behind = training.LearningRateSchedule(
            0.1, lambda epoch: 1 / epoch, start_epoch=2, staircase=False, **options
        )
        model.fit(
            batches().skip(batch),
            initial_epoch=epoch,
            epochs=epoch + epochs,
            shuffle=False,
            verbose=0,
            callbacks=[warmup, behind, seen],
        )
        return seen.rates

    # Goyal et al.: from one worker's rate to that of 4, in 12 steps.
    warm = 0.1 * (1 + 3 * np.arange(1, 2 * STEPS + 1) / (2 * STEPS))
    np.testing.assert_allclose(rates(4, 0), warm[:STEPS], rtol=1e-5)
    np.testing.assert_allclose(rates(4, 1, batch=4), warm[STEPS + 4 :], rtol=1e-5)
    np.testing.assert_allclose(rates(4, 0, batch=2), warm[2:STEPS], rtol=1e-5)
    np.testing.assert_allclose(rates(4, 2), 0.4 / (2 + np.arange(STEPS) / STEPS), rtol=1e-5)
    after = 0.2 / (2 + np.arange(4, STEPS) / STEPS)  # two workers are left, and two batches
    np.testing.assert_allclose(rates(2, 2, batch=4), after, rtol=1e-5)


def test_an_epoch_behind_one_that_went_on_begins_at_its_first_batch():
    model, seen = built(keras.optimizers.SGD(0.01)), Rates()
    schedule = training.LearningRateSchedule(
        0.1, lambda epoch: epoch, staircase=False, steps_per_epoch=STEPS, first_batch=4
    )
    callbacks = [schedule, seen]
    model.fit(batches().skip(4), epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(seen.rates, 0.1 * np.array([4, 5, 6, 7]) / STEPS, rtol=1e-5)


@pytest.mark.parametrize("first_batch", [-1, 0.5])
def test_a_first_batch_is_a_number_of_batches(first_batch):
    with pytest.raises(ValueError, match="`first_batch` must be a number of batches, 0 or more"):
        training.LearningRateWarmup(0.1, first_batch=first_batch)


def test_an_optimizer_that_keras_wraps_around_a_distributed_one_is_refused():
    optimizer = training.distribute(keras.optimizers.SGD(0.1), backward_passes_per_step=2)
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = built(optimizer)
    finally:
        keras.mixed_precision.set_global_policy(before)
    assert model.optimizer is not optimizer
    # What it keeps local, and passes that made no step, would not be found.
    for given in (None, optimizer):
        with pytest.raises(RuntimeError, match="distribute the optimizer that scales the loss"):
            training.ElasticState(model, given)


@pytest.mark.parametrize("size", ["1", "2"])
def test_an_engine_that_does_not_join_the_workers_of_an_elastic_job_is_refused(size, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    monkeypatch.setenv("HOROVOD_SIZE", size)
    with pytest.raises(RuntimeError, match=r"MPI must see every process of the job.*ELASTIC"):
        require_whole_job("MPI", 1, "Use Horovod.")


def optimizers():
    found = {
        "Adam": lambda: keras.optimizers.Adam(),
        "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    }
    if KERAS_3:
        scaling = keras.optimizers.LossScaleOptimizer
    else:
        scaling = keras.mixed_precision.LossScaleOptimizer
        found["legacy"] = lambda: keras.optimizers.legacy.Adam()
        found["legacy, scaled"] = lambda: scaling(keras.optimizers.legacy.SGD(0.1, momentum=0.9))
    return {**found, "scaled": lambda: scaling(keras.optimizers.SGD(0.1, momentum=0.9))}


@pytest.mark.parametrize("name", optimizers())
def test_an_optimizer_has_its_state_before_the_first_step(name):
    # As a new worker has to take it from others, which have made steps.
    trained = built(training.distribute(optimizers()[name]()))
    trained.fit(batches(2), shuffle=False, verbose=0)
    model = built(training.distribute(optimizers()[name]()))
    state = training.ElasticState(model)
    new, others = map(optimizer_variables, (model.optimizer, trained.optimizer))
    assert [one.shape for one in new] == [one.shape for one in others]
    assert len(others) > 1
    model.fit(batches(2), shuffle=False, verbose=0)
    state.restore()
    assert int(model.optimizer.iterations.numpy()) == 0


def every_optimizer():
    named = {name: getattr(keras.optimizers, name) for name in dir(keras.optimizers)}
    around_others = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    return {
        **{
            name: one
            for name, one in named.items()
            if isinstance(one, type) and issubclass(one, keras.optimizers.Optimizer)
            if name not in around_others
        },
        **optimizers(),
    }


@pytest.mark.parametrize("name", every_optimizer())
def test_steps_after_a_restored_state_are_those_that_followed_it(name):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    optimizer, weights = every_optimizer()[name](), model.trainable_variables
    gradients = [tf.random.stateless_normal(one.shape, [5, 6]) for one in weights]

    @tf.function  # eagerly, Keras 2's Nadam keeps a number in Python too
    def step():
        optimizer.apply_gradients(zip(gradients, weights, strict=True))

    def steps():
        for _ in range(3):
            step()
        return model.get_weights()

    state = training.ElasticState(model, optimizer)
    steps()
    state.commit()
    expected = steps()
    optimizer.learning_rate = 0.5
    steps()
    state.restore()
    assert_same(steps(), expected)


def test_passes_that_made_no_step_are_dropped():
    optimizer = training.distribute(keras.optimizers.SGD(1.0), backward_passes_per_step=2)
    model = built(optimizer)
    state = training.ElasticState(model)

    def step(number):
        weights = model.trainable_variables
        optimizer.apply_gradients([(tf.fill(one.shape, number), one) for one in weights])

    before = model.trainable_variables[0].numpy()
    step(100.0)
    state.restore()
    step(1.0)
    step(2.0)
    np.testing.assert_allclose(model.trainable_variables[0].numpy(), before - 3, rtol=1e-6)


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, np.float32(1), np.ones(2), [1j], {"a": {3}}], ids=repr
)
def test_values_that_do_not_come_back_from_json_are_refused(value):
    with pytest.raises(TypeError, match="must be numbers, strings, booleans, None, or lists"):
        training.ElasticState(built(), value=value)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"not built\. Build it first"):
        training.ElasticState(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(TypeError, match=r"must be one of tf\.keras\.optimizers"):
        training.ElasticState(built(), optimizer="sgd")
    with pytest.raises(ValueError, match=r"names of their own\. Received: commit, sync"):
        training.ElasticState(built(), sync=1, commit=2)
    with pytest.raises(TypeError, match="must be an ElasticState"):
        training.CommitState(None)
    with pytest.raises(ValueError, match="`batches_per_commit` must be a positive integer"):
        training.CommitState(training.ElasticState(built()), 0)
    with pytest.raises(TypeError, match="first argument of an elastic function must be an Elastic"):
        training.elastic(lambda state: None)(None)


def test_in_one_process_a_function_is_called_once():
    state, calls = training.ElasticState(built()), []

    @training.elastic
    def train(state, *args, **kwargs):
        """Trains."""
        calls.append((state, args, kwargs))
        if len(calls) == 2:
            raise tf.errors.UnknownError(None, None, "HorovodAllreduce, of another job")
        return "done"

    assert train.__doc__ == "Trains."
    assert train(state, 1, two=2) == "done"
    with pytest.raises(tf.errors.UnknownError):
        train(state)
    assert calls == [(state, (1,), {"two": 2}), (state, (), {})]


UNKNOWN, PRECONDITION = tf.errors.UnknownError, tf.errors.FailedPreconditionError


@pytest.mark.parametrize(
    ("kind", "message", "lost"),
    [
        (UNKNOWN, "Horovod has been shut down. This was caused by an exception on one of", True),
        (PRECONDITION, "Horovod has not been initialized; use hvd.init().", True),
        (UNKNOWN, "Read error: reset by peer [[{{node a/syncbn/b/statistics}}]]", True),
        (UNKNOWN, "Read error: reset by peer [[{{node syncbn/b/statistics_12}}]]", True),
        # A layer of this name, in a model of a user's that is named syncbn.
        (UNKNOWN, "RuntimeError: mine [[{{node syncbn/statistics/PyFunc}}]]", False),
        (UNKNOWN, "Read error: reset by peer [Op:HorovodGroupedAllreduce]", True),
        (UNKNOWN, "RuntimeError: mine [[{{node PyFunc}}]]", False),
        (UNKNOWN, "RuntimeError: of syncbn [[{{node PyFunc}}]]", False),
        (PRECONDITION, "Mismatched allreduce tensor shapes [Op:HorovodAllreduce]", False),
        (tf.errors.InvalidArgumentError, "{{node syncbn/a}} Shape of tensor", False),
    ],
)
def test_lost_collectives_are_known_from_other_errors(kind, message, lost):
    note_collective("syncbn/b/statistics")
    assert is_lost_collective(kind(None, None, message)) == lost


class Resizable:
    """A communicator of a number of workers that changes; the others send zeros."""

    name, supports_jit, finds_mixups, resizable, rank = "mpi", False, True, True, 0

    def __init__(self, size):
        self.size, self._now = size, tf.Variable(size)

    def resize(self, size):
        self.size = size
        self._now.assign(size)

    def current_size(self):
        return tf.identity(self._now)

    def current_rank(self):
        return tf.constant(0)

    def all_reduce_sum(self, tensor, name):
        return tensor


def test_a_trace_keeps_no_size():
    communicator = Resizable(1)

    @tf.function
    def averages(gradient, rows):
        sparse = tf.IndexedSlices(rows, tf.constant([3, 1]), tf.constant([5, 2]))
        dense, sparse = average_gradients([gradient, sparse], communicator, "gradients")
        return dense, tf.convert_to_tensor(sparse)

    gradient, rows = tf.constant([6.0, 12.0]), tf.constant([[6.0, 6.0], [12.0, 0.0]])
    for size in 1, 3, 2:
        communicator.resize(size)
        dense, sparse = averages(gradient, rows)
        np.testing.assert_allclose(dense, gradient / size)
        expected = np.zeros((5, 2))
        expected[[3, 1]] = rows / size
        np.testing.assert_allclose(sparse, expected)
    assert averages.experimental_get_tracing_count() == 1


def test_a_layer_of_one_worker_in_an_elastic_job_asks_for_others():
    communicator, asked = Resizable(1), []
    communicator.all_reduce_sum = lambda tensor, name: (asked.append(name), tensor)[1]
    layer = syncbn.SyncBatchNormalization(communicator=communicator)
    layer(tf.ones([2, 3]), training=True)
    assert len(asked) == 1


@pytest.mark.parametrize("options", [{"group_size": 1}, {"groups": [[0]]}, {"target_batch": 8}])
def test_groups_are_refused_in_an_elastic_job(options):
    layer = syncbn.SyncBatchNormalization(communicator=Resizable(1), **options)
    with pytest.raises(NotImplementedError, match="a layer with groups in an elastic job"):
        layer(tf.ones([2, 3]), training=True)
