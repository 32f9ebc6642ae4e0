"""`StatisticsMonitor` on every engine: its figures are those of float64 NumPy on all batches."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit
from syncbn._src.models.training_job import job_of
from syncbn._src.training.statistics_monitor import LayerFigures
from tests import patience
from tests.keras import keras
from tests.kinds_of_replicas import Nested, Strategy
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.summaries import summaries

EPSILON = 0.01


@pytest.fixture(autouse=True)
def _mended():
    mend_keras_fit()


def make(replicas, norm):
    keras.utils.set_random_seed(3)
    options = {} if norm is syncbn.SyncCentering else {"epsilon": EPSILON}

    def build():
        layers = [
            keras.layers.Dense(4),
            norm(name="first", **options),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(3),
            norm(name="second", **options),
        ]
        return keras.Sequential([keras.Input((3,)), *layers])

    if isinstance(replicas, Strategy):
        with replicas.strategy.scope():
            return build()
    return build()


def batches(replicas):
    """The batch of each replica, of its own distribution and of ragged sizes."""
    rng = np.random.default_rng(8)
    return [rng.normal(rank, 1 + rank, (5, 3)).astype("float32") for rank in range(replicas.size)]


def ranks_here(replicas):
    if isinstance(replicas, Nested):
        return range(replicas.first, replicas.first + replicas.local_size)
    if ENGINE == "mirrored":
        return range(replicas.size)
    if ENGINE == "multiworker":
        return [replicas.strategy.cluster_resolver.task_id]
    return [replicas.rank]


def batch_here(replicas, parts):
    """What this process gives: its replicas' batches, of which the last one is a sample short."""
    here = ranks_here(replicas)
    own = [parts[rank] for rank in here]
    own[-1] = own[-1][: len(own[-1]) - (here[-1] == replicas.size - 1)]
    return np.concatenate(own)


def seen_at_inference(model, x):
    """What each normalization sees, in float64, with the moving statistics of this process."""
    x, seen = np.float64(x), {}
    for layer in model.layers:
        weights = [np.float64(weight.numpy()) for weight in layer.weights]
        if layer.name in ("first", "second"):
            seen[layer.name] = x
            if len(weights) == 1:
                x = x - weights[0]
            else:
                gamma, beta, mean, variance = weights
                x = gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta
        elif weights:
            x = x @ weights[0] + weights[1]
        else:
            x = np.tanh(x)
    return seen


def expected_figures(own, moving, epsilon):
    """The figures by their definitions, of what each replica sees."""
    everything = np.concatenate(own)
    mean, variance = everything.mean(0), everything.var(0)
    moving_mean, moving_variance = moving
    drift = None
    if moving_variance is not None:
        drift = np.sqrt(np.mean(np.log((variance + epsilon) / (moving_variance + epsilon)) ** 2))
    scale = (variance if moving_variance is None else moving_variance) + epsilon
    between = sum(len(one) * (one.mean(0) - mean) ** 2 for one in own) / len(everything)
    kept = scale > 0  # without an epsilon, a dead channel has none
    return LayerFigures(
        np.sqrt(np.mean((mean - moving_mean)[kept] ** 2 / scale[kept])),
        drift,
        np.sqrt(np.mean(between[kept] / (variance + epsilon)[kept])),
        int(np.sum(variance <= epsilon / 100)),
    )


def set_statistics(model, rank):
    """Gives the layers other statistics than the initial ones, and one channel that is dead."""
    rng = np.random.default_rng(rank)
    kernel, bias = model.layers[0].get_weights()
    kernel[:, 2] = 0
    model.layers[0].set_weights([kernel, bias])
    statistics = {
        name: (rng.normal(size=size), rng.uniform(1, 2, size))
        for name, size in (("first", 4), ("second", 3))
    }
    layers = {name: model.get_layer(name) for name in statistics}
    if not hasattr(layers["first"], "moving_variance"):
        statistics = {name: (mean, None) for name, (mean, _) in statistics.items()}
    syncbn.set_moving_statistics(model, statistics)
    return statistics


@pytest.mark.parametrize(
    "norm",
    workers.kept(
        [syncbn.SyncBatchNormalization, syncbn.SyncCentering, keras.layers.BatchNormalization],
        syncbn.SyncBatchNormalization,
        keras.layers.BatchNormalization,
    ),
)
def test_the_figures_are_those_of_all_replicas(norm, replicas):
    model, parts = make(replicas, norm), batches(replicas)
    parts[-1] = parts[-1][:-1]
    across = workers.across(replicas)
    # Plain layers have other moving statistics on each worker.
    plain = norm is keras.layers.BatchNormalization
    statistics = set_statistics(model, across.rank if plain else 0)
    before = model.get_weights()
    monitor = training.StatisticsMonitor(batch_here(replicas, batches(replicas)), logs="layers")
    monitor.set_model(model)
    monitor.on_train_begin()
    logs = {}
    monitor.on_epoch_end(0, logs)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)

    # A replica runs with the statistics of its process.
    seen = []
    of_process = getattr(replicas, "local_size", 1) if across.size > 1 else replicas.size
    for rank, part in enumerate(parts):
        if plain:
            set_statistics(model, rank // of_process)
        seen.append(seen_at_inference(model, part))
    if plain:
        every = [set_statistics(model, rank) for rank in range(across.size)]
        statistics = {
            name: [np.mean([one[name][i] for one in every], 0) for i in range(2)]
            for name in statistics
        }
    epsilon = 0 if norm is syncbn.SyncCentering else EPSILON
    assert list(monitor.latest) == ["first", "second"]
    for name, figures in monitor.latest.items():
        own = [one[name] for one in seen]
        expected = expected_figures(own, statistics[name], epsilon)
        for figure, value in expected._asdict().items():
            found = getattr(figures, figure)
            assert (found is None) == (value is None)
            if value is not None:
                assert found == pytest.approx(value, rel=1e-4), (name, figure)
                assert logs[f"{figure}/{name}"] == found
    assert monitor.latest["first"].dead_channels == 1
    drifts = [figures.mean_drift for figures in monitor.latest.values()]
    assert logs["mean_drift"] == max(drifts)
    assert logs["dead_channels"] == 1


def test_fit_logs_the_same_on_all_workers_and_rank_zero_writes(replicas, tmp_path):
    model = make(replicas, syncbn.SyncBatchNormalization)
    if isinstance(replicas, Strategy):
        with replicas.strategy.scope():
            compile_(model)
    else:
        compile_(model)
    x = np.random.default_rng(1).normal(size=(8 * replicas.size, 3)).astype("float32")
    monitor = training.StatisticsMonitor(x, tmp_path, logs="layers")
    metrics = training.AverageMetrics()
    history = model.fit(
        x, x, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[monitor, metrics]
    ).history
    assert len(history["mean_drift"]) == 2
    across = job_of(model).workers()
    figures = [history[name][-1] for name in sorted(history) if "drift" in name or "spread" in name]
    # Where each worker has the same batch, it spreads only among the replicas of a process.
    assert len(figures) >= 6
    workers_agree = np.array([float(value) for value in figures])
    total = across.all_reduce_sum(tf.constant(workers_agree), "compare").numpy()
    np.testing.assert_array_equal(total, across.size * workers_agree)
    written = [*tmp_path.glob("statistics/events.*")]
    assert len(written) == (across.rank == 0)
    for file in written:
        found = summaries(file)
        assert {step for step, _ in found} == {0, 1}
        for name, one in monitor.latest.items():
            for figure, value in one._asdict().items():
                if value is not None:
                    tag = f"{figure}/{name}"
                    assert found[1, tag] == pytest.approx(value, rel=1e-6)
                    assert history[tag][1] == value
    for one in monitor.latest.values():
        assert (one.waiting_ms is not None) == (across.size > 1)
        assert one.waiting_ms is None or 0 < one.waiting_ms < 1e3 * patience.limit()


def compile_(model):
    optimizer = training.distribute(keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse", jit_compile=False)


@workers.in_separate_processes
def test_what_fails_on_one_worker_fails_on_all(replicas):
    across = workers.across(replicas)
    last = across.size - 1
    model = make(replicas, syncbn.SyncBatchNormalization)
    here = across.rank == last
    monitor = training.StatisticsMonitor(np.zeros([4, 2 if here else 3], "float32"))
    monitor.set_model(model)
    monitor.on_train_begin()
    # The last worker's has another number of features.
    message = "shape|size" if here else f"an error on rank {last}"
    with pytest.raises((ValueError, RuntimeError, tf.errors.OpError), match=message):
        monitor.on_epoch_end(0, {})
