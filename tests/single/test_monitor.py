"""`StatisticsMonitor` in one process: when it observes, and what it says of what."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.models.replica_spread import JointStatistics
from syncbn._src.training.statistics_monitor import _figures, _shared_out
from syncbn._src.watchdog import flight_recorder
from tests.keras import keras
from tests.summaries import summaries

X = np.random.default_rng(0).normal(2, 3, (24, 3)).astype("float32")


def model(norm=None):
    layers = [keras.layers.Dense(4), norm or keras.layers.BatchNormalization(name="norm")]
    made = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])
    made.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    return made


def fit(monitor, made=None, **options):
    made = made or model()
    return made.fit(X, X[:, :1], 4, verbose=0, callbacks=[monitor], **options).history


def test_figures_of_what_is_known():
    joint = JointStatistics(
        count=np.array([10.0, 10.0]),
        mean=np.array([3.0, 1.0]),
        within=np.array([0.5, 0.0]),
        between=np.array([0.5, 0.0]),
        moving_mean=np.array([1.0, 1.0]),
        moving_variance=np.array([4.0, 1.0]),
    )
    found = _figures(joint, 0.0, replicas=2)
    assert found.mean_drift == pytest.approx(np.sqrt((1 + 0) / 2))
    # The second channel does not vary: where there is no epsilon, it has no scale, and is dead.
    assert found.replica_spread == pytest.approx(np.sqrt(0.5))
    assert found.dead_channels == 1
    alike = joint._replace(within=np.array([3.5, 1.0]))
    assert _figures(alike, 0.0, replicas=2).variance_drift == 0
    assert _figures(alike, 0.0, replicas=1).replica_spread is None
    off = joint._replace(within=np.array([3.5, np.e]))
    assert _figures(off, 0.0, replicas=2).variance_drift == pytest.approx(np.sqrt(1 / 2))
    assert _figures(joint, 100.0, replicas=2).dead_channels == 2
    assert np.isnan(_figures(joint._replace(mean=np.full(2, np.nan)), 0.1, 2).mean_drift)


def test_it_observes_after_so_many_batches_across_epochs(tmp_path):
    monitor = training.StatisticsMonitor(X, tmp_path, update_freq=4)
    history = fit(monitor, epochs=2)  # of six batches each
    (file,) = tmp_path.glob("statistics/events.*")
    assert {step for step, _ in summaries(file)} == {4, 8, 12}
    assert len(history["mean_drift"]) == 2


def test_the_steps_of_the_summaries_go_on_in_the_next_fit(tmp_path):
    made = model()
    monitor = training.StatisticsMonitor(X, tmp_path, update_freq=4)
    fit(monitor, made)
    fit(monitor, made)
    fit(training.StatisticsMonitor(X, tmp_path, update_freq=4), made)  # as in a new process
    files = tmp_path.glob("statistics/events.*")
    found = [step for file in files for step, tag in summaries(file) if tag == "mean_drift/norm"]
    assert sorted(found) == [4, 8, 12, 16]


def test_the_steps_of_the_summaries_go_on_where_a_checkpoint_does(tmp_path):
    def fail(batch, logs):
        if made.optimizer.iterations == 9:
            raise ZeroDivisionError

    lost = keras.callbacks.LambdaCallback(on_train_batch_begin=fail)
    for fails in True, False:
        made, monitor = model(), training.StatisticsMonitor(X, tmp_path, update_freq=2)
        preemption = training.PreemptionCheckpoint(tmp_path / "job", every=2)
        callbacks, options = [monitor, preemption], {"epochs": 2, "shuffle": False, "verbose": 0}
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            made.fit(X, X[:, :1], 4, callbacks=[*callbacks, *[lost] * fails], **options)
        preemption._notice.stop()
    files = tmp_path.glob("statistics/events.*")
    found = [step for file in files for step, tag in summaries(file) if tag == "mean_drift/norm"]
    assert sorted(found) == [2, 4, 6, 8, 10, 12]


def test_several_batches_in_one_execution_are_counted(tmp_path):
    made = model()
    made.compile("sgd", "mse", jit_compile=False, steps_per_execution=3)
    fit(training.StatisticsMonitor(X, tmp_path, update_freq=2), made)
    (file,) = tmp_path.glob("statistics/events.*")
    assert {step for step, _ in summaries(file)} == {3, 6}


def test_what_the_logs_get():
    figures = {"mean_drift", "variance_drift", "dead_channels"}
    of_layers = {f"{figure}/norm" for figure in figures}
    for logs, expected in (("largest", figures), ("layers", figures | of_layers), (None, set())):
        assert set(fit(training.StatisticsMonitor(X, logs=logs))) == {"loss", *expected}


def test_drift_that_recalibration_takes_away():
    made = model()
    monitor = training.StatisticsMonitor(X)
    fit(monitor, made)
    assert monitor.latest["norm"].mean_drift > 0.1
    syncbn.recalibrate(made, [X], verbose=0)
    monitor.on_epoch_end(1)
    assert monitor.latest["norm"].mean_drift < 1e-5
    assert monitor.latest["norm"].variance_drift < 1e-5


def test_layers_that_are_not_called_are_left_out():
    made = model()
    made.spare = keras.layers.BatchNormalization(name="spare")
    made.spare.build((None, 4))
    monitor = training.StatisticsMonitor(X)
    fit(monitor, made)
    assert list(monitor.latest) == ["norm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_freq": 0}, 'must be a positive integer, or "epoch"'),
        ({"update_freq": "batch"}, "Received: update_freq='batch'"),
        ({"logs": "all"}, 'must be "largest", "layers" or None'),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training.StatisticsMonitor(X, **options)


def test_a_dataset_is_no_batch():
    with pytest.raises(TypeError, match=r"Give next\(iter\(dataset\)\)"):
        training.StatisticsMonitor(tf.data.Dataset.from_tensors(X))


def test_each_collective_counts_once():
    seconds = {
        "syncbn/norm/statistics": 1.0,
        "syncbn/norm/call_2/gradient": 3.0,
        "syncbn/block/norm/statistics": 8.0,
        "syncbn/block/statistics": 16.0,
        "syncbn/last_norm/statistics": 32.0,
        "syncbn/average_statistics/float64": 64.0,
    }
    scopes = ["syncbn/norm", "syncbn/block/norm", "syncbn/block", "syncbn/last_norm"]
    assert _shared_out(seconds, scopes) == [4, 8, 16, 32]
    # In Keras 2 layers in different models may have the same scope.
    alike = ["syncbn/norm", "syncbn/last_norm", "syncbn/norm"]
    assert _shared_out({name: seconds[name] for name in seconds if "block" not in name}, alike) == [
        *(2, 32, 2)
    ]


def test_the_recorder_adds_up_the_time_in_collectives(monkeypatch):
    recorder = flight_recorder.FlightRecorder()
    times = iter([1.0, 1.25, 2.0, 2.5, 3.0, 4.0, 9.0])
    monkeypatch.setattr(flight_recorder.time, "time", lambda: next(times))
    for name in "a", "b", "a":
        with recorder.enter(name, None):
            pass
    with pytest.raises(ZeroDivisionError), recorder.enter("a", None):
        1 / 0  # noqa: B018
    assert recorder.seconds() == {"a": 1.25, "b": 0.5}
