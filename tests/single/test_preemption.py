"""Checkpoints of a job that may be told to end: what they hold, their files, the order of data."""

import itertools
import json
import os
import resource
import signal

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from syncbn._src.training.sample_order import SampleOrder
from tests.keras import KERAS_3, keras
from tests.preemption_jobs import Fails, compiled, fit, samples
from tests.two_optimizers import TwoOptimizers

if KERAS_3:
    LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
else:
    LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: training.distribute(keras.optimizers.Adam(0.1)),
    "loss scale": lambda: LossScaleOptimizer(keras.optimizers.RMSprop(0.1)),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    ),
}
if hasattr(keras.optimizers, "MultiOptimizer"):  # of which TensorFlow finds only the outside

    def of_kernels_and_others():
        rule = {".*kernel": keras.optimizers.Adam(0.1)}
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9), rule)
        )

    OPTIMIZERS["several in one"] = of_kernels_and_others
if not KERAS_3:
    OPTIMIZERS["legacy"] = lambda: keras.optimizers.legacy.Adam(0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_follows_is_what_would_have_followed(name, tmp_path):
    # All of an optimizer's state shows in the next steps: slots, iterations, rate, loss scale.
    model = compiled(OPTIMIZERS[name]())
    fit(model, training.PreemptionCheckpoint(tmp_path))
    if name not in ("schedule", "several in one"):
        model.optimizer.learning_rate = 0.03
    if name == "loss scale" and KERAS_3:
        model.optimizer.dynamic_scale.assign(64.0)
    saved = training.PreemptionCheckpoint(tmp_path / "later", every=1)
    saved.restore(model, model.optimizer)
    saved.step(2, 3)
    other = compiled(OPTIMIZERS[name]())
    there = training.PreemptionCheckpoint(tmp_path / "later")
    assert there.restore(other, other.optimizer) == (2, 3)
    for preemption in saved, there:
        preemption._notice.stop()
    if name == "loss scale":
        assert scale(other.optimizer) == scale(model.optimizer)
    for one in model, other:
        fit(one, initial_epoch=0, epochs=1)
    assert int(other.optimizer.iterations.numpy()) == int(model.optimizer.iterations.numpy())
    for ours, theirs in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def two_optimizers(**options):
    keras.utils.set_random_seed(4)
    model = TwoOptimizers()
    model.compile(keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1), **options)
    return model


def fit_two(model, *callbacks, epochs):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options)
    return model


def test_all_optimizers_of_a_model_go_on(tmp_path):
    whole = fit_two(two_optimizers(), epochs=4)
    fit_two(two_optimizers(), training.PreemptionCheckpoint(tmp_path), epochs=2)
    model = fit_two(two_optimizers(), training.PreemptionCheckpoint(tmp_path), epochs=4)
    assert model.history.epoch == [2, 3]
    assert int(model.of_first.iterations) == 8
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_of_several_optimizers_it_must_be_known_what_they_train(tmp_path):
    model = two_optimizers(build=False)
    with pytest.raises(ValueError, match=r"of_first, of Adam, which is not built\. Build it first"):
        fit_two(model, training.PreemptionCheckpoint(tmp_path), epochs=1)
    model.of_first.build(model.first.trainable_variables)
    with pytest.raises(ValueError, match=r"model\.others\[0\]\.build\(variables\)"):
        fit_two(model, training.PreemptionCheckpoint(tmp_path), epochs=1)


@pytest.mark.skipif(KERAS_3, reason="Keras 3 has no others")
def test_older_optimizers_find_their_state_by_the_variable(tmp_path):
    def make():
        keras.utils.set_random_seed(4)
        model = TwoOptimizers()
        model.compile(*(keras.optimizers.legacy.Adam(0.1) for _ in range(2)), build=False)
        return model

    whole = fit_two(make(), epochs=4)
    fit_two(make(), training.PreemptionCheckpoint(tmp_path), epochs=2)
    model = fit_two(make(), training.PreemptionCheckpoint(tmp_path), epochs=4)
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def scale(optimizer):
    return float(optimizer.dynamic_scale if KERAS_3 else optimizer.loss_scale)


class Signal(keras.callbacks.Callback):
    """Sends a signal to this process, before a step of the second epoch."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == (1, self.step):
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_end(self, batch, logs=None):
        """Is there so that Keras calls callbacks one after the other, in this thread."""


@pytest.fixture
def signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("step", "steps_per_execution"), [(5, 1), (2, 2)])
def test_arrays_go_on_behind_the_steps_that_were_made(
    step, steps_per_execution, tmp_path, signals_as_before
):
    def make():
        keras.utils.set_random_seed(4)
        model = compiled(keras.optimizers.Adam(0.1))
        model.compile(model.optimizer, "mse", steps_per_execution=steps_per_execution)
        return model

    whole = make()
    expected = fit(whole, epochs=3, validation_data=samples(8))["val_loss"]
    with pytest.raises(SystemExit) as ended:
        fit(make(), Signal(step), training.PreemptionCheckpoint(tmp_path, exit_code=9), epochs=3)
    assert ended.value.code == 9
    # Where fewer epochs are asked for than have been begun, the checkpoint stays as it is.
    assert not fit(make(), training.PreemptionCheckpoint(tmp_path), epochs=1)
    model, preemption = make(), training.PreemptionCheckpoint(tmp_path)
    found = fit(model, preemption, epochs=3, validation_data=samples(8))["val_loss"]
    np.testing.assert_allclose(found, expected[1:], rtol=1e-5)
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# What Keras 3 says at the end of data whose length it does not know.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("known", "every", "steps_per_execution"), [(False, "epoch", 1), (False, 3, 3), (True, 4, 1)]
)
def test_after_the_last_step_of_an_epoch_its_end_follows(
    known, every, steps_per_execution, tmp_path, signals_as_before
):
    if steps_per_execution > 1 and not KERAS_3:
        pytest.skip("Keras 2 counts no step of an execution that the data do not fill")
    x, y = samples()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    data = data if known else data.filter(lambda *_: True)

    def train(*callbacks):
        keras.utils.set_random_seed(4)
        options = {"metrics": ["mae"], "steps_per_execution": steps_per_execution}
        model = compiled(keras.optimizers.SGD(0.1), **options)
        options = {"validation_data": (x, y), "shuffle": False, "verbose": 0}
        model.fit(data, epochs=3, callbacks=list(callbacks), **options)
        return model

    whole, last = train(), Signal(7 - 7 % steps_per_execution)
    with pytest.raises(SystemExit):
        train(last, training.PreemptionCheckpoint(tmp_path, every))
    model = train(training.PreemptionCheckpoint(tmp_path, every))
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert model.history.epoch == ([2] if known else [1, 2])
    assert len(model.history.history["val_mae"]) == len(model.history.epoch)


@pytest.mark.parametrize(
    ("step", "steps_left"),
    [
        (2, 3),  # of the 20 samples that are left 2 make no batch
        (6, 0),  # nor do the last 4
    ],
)
def test_the_rest_of_an_epoch_in_other_batches(step, steps_left, tmp_path, signals_as_before):
    x, y = map(tf.constant, samples())

    def fit_by_numbers(batch, *callbacks):
        model, preemption = compiled("sgd"), training.PreemptionCheckpoint(tmp_path)
        data = preemption.indices(32, batch, 3, seed=1)
        data = data.map(lambda index: (tf.gather(x, index), tf.gather(y, index)))
        options = {"steps_per_epoch": 32 // batch, "shuffle": False, "verbose": 0}
        model.fit(data, epochs=3, callbacks=[*callbacks, preemption], **options)
        return int(model.optimizer.iterations.numpy())

    with pytest.raises(SystemExit):
        fit_by_numbers(4, Signal(step))
    with pytest.raises(ValueError, match="steps_per_epoch=8"):
        fit(compiled("sgd"), with_order(training.PreemptionCheckpoint(tmp_path)), batch_size=8)
    # An epoch has 8 steps of 4 samples, and 5 of 6.
    assert fit_by_numbers(6) == 8 + (step + 1) + steps_left + 5


def test_an_epoch_of_which_no_batch_is_left_is_over(tmp_path, signals_as_before):
    preemption = with_order(training.PreemptionCheckpoint(tmp_path, every=7))
    model = compiled("sgd")
    preemption.restore(model, model.optimizer)
    preemption.step(0, 7)
    again = training.PreemptionCheckpoint(tmp_path)
    again.indices(32, 8, 3, seed=1)  # of the 4 samples that are left none
    with pytest.raises(ValueError, match="steps_per_epoch=4"):
        fit(model, again, batch_size=4)  # which leaves it as it was

    def found():
        progress = training.PreemptionCheckpoint(tmp_path)._find()[1]
        return progress["epoch"], progress["batch"], progress["seen"]

    assert found() == (0, 7, 28)
    assert again.restore(model, model.optimizer) == (1, 0)
    assert found() == (1, 0, 0)


def test_training_goes_on_at_the_first_step_of_an_execution(tmp_path, signals_as_before):
    with pytest.raises(SystemExit):
        fit(compiled("sgd"), Signal(5), training.PreemptionCheckpoint(tmp_path))
    for per_execution in 4, 8:  # 6 of 8 steps: the last execution, or the only one
        model = compiled("sgd", steps_per_execution=per_execution)
        with pytest.raises(ValueError, match=f"steps_per_execution={per_execution}, and 6 steps"):
            fit(model, training.PreemptionCheckpoint(tmp_path))


def test_a_rate_of_zero_in_a_step_that_was_made_ends_no_momentum(tmp_path, signals_as_before):
    def train(*callbacks):
        keras.utils.set_random_seed(4)
        model = compiled(keras.optimizers.SGD(0.1, momentum=0.9))
        schedule = training.LearningRateSchedule(0.1, lambda epoch: abs(epoch - 1), staircase=False)
        fit(model, schedule, *callbacks, epochs=3)
        return model

    whole = train()
    with pytest.raises(SystemExit):
        train(Signal(3), training.PreemptionCheckpoint(tmp_path))
    model = train(training.PreemptionCheckpoint(tmp_path))
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_loop_of_ones_own_goes_on_too(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    model = compiled("sgd")
    preemption = training.PreemptionCheckpoint(tmp_path, every=None)
    assert preemption.restore(model, model.optimizer) == (0, 0)
    preemption.step(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    saved = model.get_weights()
    with pytest.raises(SystemExit) as ended:
        preemption.step(0, 2)
    assert ended.value.code == 75
    preemption._notice.stop()
    model.set_weights([weight + 1 for weight in saved])
    preemption = training.PreemptionCheckpoint(tmp_path, every=None)
    assert preemption.restore(model, model.optimizer) == (0, 2)
    for ours, theirs in zip(model.get_weights(), saved, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    preemption.finish(3)
    assert signal.getsignal(signal.SIGTERM) is before
    assert training.PreemptionCheckpoint(tmp_path)._find()[1]["epoch"] == 3


def with_order(preemption):
    preemption.indices(32, 4, 3, seed=1)
    return preemption


def test_data_that_end_before_the_checkpoint_are_refused(tmp_path, signals_as_before):
    x, y = samples()
    with pytest.raises(SystemExit):
        fit(compiled("sgd"), Signal(5), training.PreemptionCheckpoint(tmp_path))
    data = tf.data.Dataset.from_tensor_slices((x[:16], y[:16])).batch(4)
    data = data.filter(lambda *_: True)  # of unknown length, as Keras would say it otherwise
    model = compiled("sgd")
    preemption = training.PreemptionCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="data that end after 4 batches of an epoch"):
        model.fit(
            data, epochs=2, steps_per_epoch=8, callbacks=[preemption], shuffle=False, verbose=0
        )


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    model = compiled("sgd")
    preemption = training.PreemptionCheckpoint(tmp_path, every=1)
    preemption.restore(model, model.optimizer)
    preemption.step(0, 1)
    saved = model.get_weights()
    model.set_weights([weight + 1 for weight in saved])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may have more bytes
    try:
        with pytest.raises(RuntimeError, match="checkpoint-1 is whole, and still there"):
            preemption.step(0, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        preemption._notice.stop()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    again = training.PreemptionCheckpoint(tmp_path)
    assert again.restore(model, model.optimizer) == (0, 1)
    again._notice.stop()
    for ours, theirs in zip(model.get_weights(), saved, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_a_killed_process_has_left_half_written_is_no_checkpoint(tmp_path):
    model = compiled("sgd")
    fit(model, training.PreemptionCheckpoint(tmp_path))
    (found,) = os.listdir(tmp_path)
    (tmp_path / ".writing-9").mkdir()
    (tmp_path / ".writing-9" / "progress.json").write_text("{")
    fit(model, training.PreemptionCheckpoint(tmp_path), epochs=3)
    (later,) = os.listdir(tmp_path)
    assert int(later.rpartition("-")[2]) > int(found.rpartition("-")[2])


def test_training_that_is_over_is_not_begun_again(tmp_path):
    model = compiled("sgd")

    def stop(epoch, logs):
        model.stop_training = epoch == 1

    early = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    stopped = fit(model, early, training.PreemptionCheckpoint(tmp_path), epochs=4)
    assert len(stopped["loss"]) == 2
    assert not fit(model, training.PreemptionCheckpoint(tmp_path), epochs=4)
    assert len(fit(model)["loss"]) == 2  # a `fit` without it is its own


def test_signals_are_left_to_what_caught_them_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path))
    with pytest.raises(ValueError, match=r"must be of this model\. Received"):
        fit(compiled("sgd", units=5), training.PreemptionCheckpoint(tmp_path))
    with pytest.raises(ValueError, match=r"must be of this model and optimizer.* one of SGD"):
        fit(compiled("adam"), training.PreemptionCheckpoint(tmp_path))
    # One that has all variables of the other, and more.
    fit(compiled("adam"), training.PreemptionCheckpoint(tmp_path / "adam"))
    with pytest.raises(ValueError, match=r"must be of this model and optimizer.* one of Adam"):
        fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path / "adam"))
    wrapped = LossScaleOptimizer(keras.optimizers.Adam(0.1))
    with pytest.raises(ValueError, match=r"for LossScaleOptimizer.* around Adam"):
        fit(compiled(wrapped), training.PreemptionCheckpoint(tmp_path / "adam"))
    preemption = training.PreemptionCheckpoint(tmp_path)
    with pytest.raises(ValueError, match=r"samples=32, seed=1, and a checkpoint .* other data"):
        preemption.indices(32, 4, 2, seed=1)
    (file,) = tmp_path.glob("*/progress.json")
    progress = json.loads(file.read_text())
    file.write_text(json.dumps({**progress, "epoch": 0, "batch": 3}))
    with pytest.raises(ValueError, match="an epoch of 4 steps, and a checkpoint of one of 8"):
        fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path), batch_size=8)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"must have a readable progress\.json"):
        fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path))


def test_a_checkpoint_whose_variables_are_gone_is_refused(tmp_path):
    fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path))
    for file in tmp_path.glob("*/variables*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-\d+ \(.*\)\. Name another folder"):
        fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path))


def test_data_in_another_order_than_the_checkpoints_are_refused(tmp_path):
    preemption, model = with_order(training.PreemptionCheckpoint(tmp_path)), compiled("sgd")
    preemption.restore(model, model.optimizer)
    preemption.finish(1)
    with pytest.raises(ValueError, match=r"of data from PreemptionCheckpoint\.indices, and others"):
        fit(model, training.PreemptionCheckpoint(tmp_path))


@pytest.mark.parametrize("batch_size", [0, 33])
def test_a_batch_must_fit_into_the_samples(batch_size, tmp_path):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} for 1 workers and samples=32"):
        training.PreemptionCheckpoint(tmp_path).indices(32, batch_size, 3)


def test_a_model_that_is_not_built_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)], name="unbuilt")
    with pytest.raises(ValueError, match=r"Received: unbuilt, which is not\. Give it an Input"):
        training.PreemptionCheckpoint(tmp_path).restore(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be a positive integer, 'epoch' or None"),
        ({"exit_code": 0}, "`exit_code` must be one that stands for no success"),
        ({"path": "run[1]"}, r"characters \*\?\[\\, which TensorFlow takes for a pattern"),
        ({"signals": [signal.SIGKILL]}, "can catch. Received: SIGKILL"),
        ({"signals": [999]}, "`signals` must be of the module signal"),
    ],
)
def test_wrong_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training.PreemptionCheckpoint(**{"path": tmp_path, **options})


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_sample_is_seen_once_in_an_epoch_whoever_goes_on(seed, size):
    samples, epochs = 50, 3
    whole = list(SampleOrder(samples, 12, seed).batches(0, 0, epochs).as_numpy_iterator())
    assert len(whole) == epochs * 4
    of_epochs = [np.concatenate(whole[4 * epoch : 4 * epoch + 4]) for epoch in range(epochs)]
    for order in of_epochs:
        assert len({*order.tolist()}) == 48
        assert set(order.tolist()) <= set(range(samples))
    if seed is None:
        assert of_epochs[0].tolist() == list(range(48))
    else:
        assert len({order.tobytes() for order in of_epochs}) == epochs
        assert np.abs(np.diff(of_epochs[0])).mean() > 5  # 1 where nothing is shuffled
    # After 24 samples of epoch 1, others go on, with another batch.
    other = SampleOrder(samples, 6, seed)
    parts = [
        list(other.batches(1, 24, epochs, rank, size).as_numpy_iterator()) for rank in range(size)
    ]
    assert {len(part) for part in parts} == {4 + 8}
    together = [np.concatenate(step) for step in zip(*parts, strict=True)]
    rest = np.concatenate(together[:4])
    assert not set(rest.tolist()) & set(of_epochs[1][:24].tolist())
    assert {*rest[:24].tolist()} == {*of_epochs[1][24:48].tolist()}
    for step, batch in enumerate(together[4:8]):
        assert {*batch.tolist()} == {*of_epochs[2][6 * step : 6 * step + 6].tolist()}


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no SwapEMAWeights")
def test_averages_that_are_put_into_the_model_behind_it_are_not_gone_on_from(
    tmp_path, signals_as_before
):
    def train(*callbacks):
        keras.utils.set_random_seed(4)
        model = compiled(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8))
        averages = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        return model, fit(model, *callbacks, averages, epochs=4)["loss"]

    def fail(step):
        if step == 2:
            raise ZeroDivisionError

    whole, losses = train()
    lost = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: fail(calls()))
    for interruption, at in (Signal(2), (1, 3)), (lost, (1, 0)):
        preemption = training.PreemptionCheckpoint(tmp_path / str(at))
        calls = itertools.count(-8).__next__  # -8 is the first epoch's first step
        with pytest.raises((SystemExit, ZeroDivisionError)):
            train(interruption, preemption)
        preemption._notice.stop()
        assert preemption._saved == at
        model, found = train(training.PreemptionCheckpoint(tmp_path / str(at)))
        np.testing.assert_allclose(found[1:], losses[2:], rtol=1e-5)
        for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_an_error_among_the_skipped_steps_leaves_training_as_it_was(
    plain, tmp_path, signals_as_before
):
    with pytest.raises(SystemExit):
        fit(compiled("sgd"), Signal(5), training.PreemptionCheckpoint(tmp_path))
    model = compiled("sgd")
    with pytest.raises(RuntimeError, match="a callback failed"):
        fit(model, Fails(2), training.PreemptionCheckpoint(tmp_path))
    before = int(model.optimizer.iterations.numpy())
    if plain:
        fit(model, epochs=1)
        assert int(model.optimizer.iterations.numpy()) == before + 8
    else:
        fit(model, training.PreemptionCheckpoint(tmp_path))
        assert int(model.optimizer.iterations.numpy()) == 16


def saved_at(preemption, monkeypatch):
    """Returns a list of the epochs and steps that are saved from now on."""
    positions, write = [], preemption._files.write

    def noted(variables, progress, **options):
        positions.append((progress["epoch"], progress["batch"]))
        write(variables, progress, **options)

    monkeypatch.setattr(preemption._files, "write", noted)
    return positions


@pytest.mark.parametrize(
    ("every", "steps_per_execution", "expected"),
    [
        (np.int64(4), 2, [(0, 4), (1, 0), (1, 4), (2, 0)]),
        (2, 3, [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]),  # the last has two steps
    ],
)
def test_positions_are_saved_after_as_many_steps_and_not_where_nothing_is_done(
    every, steps_per_execution, expected, tmp_path, monkeypatch
):
    preemption = training.PreemptionCheckpoint(tmp_path, every=every)
    positions = saved_at(preemption, monkeypatch)
    model = compiled("sgd", steps_per_execution=steps_per_execution)
    fit(model, preemption)
    # At the end once more, since other callbacks may have set weights there.
    expected = [*expected, (2, 0)]
    assert positions == expected
    fit(model, preemption)
    assert positions == expected


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 makes as many steps as it is told")
def test_executions_that_go_beyond_an_epoch_are_refused(tmp_path):
    preemption = with_order(training.PreemptionCheckpoint(tmp_path))  # 8 steps
    with pytest.raises(ValueError, match=r"steps_per_execution=3, and 8 steps\. Compile"):
        fit(compiled("sgd", steps_per_execution=3), preemption, steps_per_epoch=8)


def test_a_loop_of_ones_own_saves_each_epoch(tmp_path, monkeypatch):
    preemption, model = training.PreemptionCheckpoint(tmp_path), compiled("sgd")
    positions = saved_at(preemption, monkeypatch)
    preemption.restore(model, model.optimizer)
    for epoch in range(3):
        for step in range(1, 4):
            preemption.step(np.int64(epoch), tf.constant(step))
    preemption.finish(np.int32(3))
    assert positions == [(1, 1), (2, 1), (3, 0)]


def test_numbers_of_numpy_and_tensorflow_are_numbers(tmp_path):
    x, y = map(tf.constant, samples())
    preemption = training.PreemptionCheckpoint(tmp_path)
    numbers = preemption.indices(tf.constant(32), np.int64(4), np.int32(2), seed=np.int64(0))
    data = numbers.map(lambda index: (tf.gather(x, index), tf.gather(y, index)))
    options = {"steps_per_epoch": 8, "shuffle": False, "verbose": 0}
    compiled("sgd").fit(data, epochs=2, callbacks=[preemption], **options)
    assert training.PreemptionCheckpoint(tmp_path)._find()[1]["order"] == [32, 0]


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path):
    copy = tmp_path / "checkpoint-1-backup"
    copy.mkdir()
    fit(compiled("sgd"), training.PreemptionCheckpoint(tmp_path))
    assert copy.is_dir()
