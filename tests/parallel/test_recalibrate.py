"""`recalibrate` by several workers, each with batches of its own, some with none."""

import contextlib
import itertools

import digits_data
import numpy as np
import pytest
import train_digits

import syncbn
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.models.recalibration import recalibrate
from syncbn._src.models.training_job import job_of
from tests.keras import keras
from tests.kinds_of_replicas import Strategy

BATCH = 50
IMAGES = digits_data.load_data()[0].images


@pytest.fixture
def scope(replicas):
    """The context in which models are made."""
    return replicas.strategy.scope if isinstance(replicas, Strategy) else contextlib.nullcontext


def shards(size):
    """Ragged parts, of which the second one is empty where there are three."""
    ends = {1: [], 2: [870], 3: [870, 870]}[size]
    return np.split(IMAGES, ends)


def batches(images):
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def inputs_of_normalizations(model, fixed, images):
    """What each one sees of these batches; those without ``fixed`` statistics use the batch's."""
    seen = {}
    for x in images:
        for layer in model.layers:
            if hasattr(layer, "moving_mean"):
                rows = np.float64(x).reshape(-1, x.shape[-1])
                seen.setdefault(layer.name, []).append(rows)
                mean, variance = fixed.get(layer.name, (rows.mean(0), rows.var(0)))
                gamma, beta = (weight.numpy() for weight in (layer.gamma, layer.beta))
                x = gamma * (x - mean) / np.sqrt(variance + layer.epsilon) + beta
                x = x.astype("float32")
            else:
                x = layer(x).numpy()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


@pytest.mark.parametrize(("norm", "exact"), [("batch", False), ("sync", True)])
def test_the_statistics_are_those_of_all_workers(replicas, scope, norm, exact):
    keras.utils.set_random_seed(0)
    with scope():
        model = train_digits.build_model(norm)
    workers = job_of(model).workers()
    parts = [batches(images) for images in shards(workers.size)]
    recalibrate(model, parts[workers.rank], exact=exact, verbose=0)

    norms = [layer for layer in model.layers if hasattr(layer, "moving_mean")]
    fixed = {}
    for number, layer in enumerate(norms):
        if exact or not number:
            seen = inputs_of_normalizations(model, fixed, itertools.chain(*parts))
        rows = seen[layer.name]
        variance = rows.var(0)
        if getattr(layer, "unbiased_moving_variance", False):
            variance *= len(rows) / (len(rows) - 1)
        if exact:
            fixed[layer.name] = rows.mean(0), variance
        for statistic, expected in ("moving_mean", rows.mean(0)), ("moving_variance", variance):
            (own, *others) = replicas.moving([layer])[statistic].values()
            np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-6)
            for row in [*others, *all_gather(workers, np.float64(own), "compare")]:
                np.testing.assert_array_equal(row, own)


def small_model(scope):
    with scope():
        layers = [keras.layers.BatchNormalization(name=name) for name in ("first", "second")]
        model = keras.Sequential([keras.Input((3,)), layers[0], keras.layers.Dense(3), layers[1]])
    return model


def require_error_on_all(model, dataset, error, message, **options):
    before = syncbn.moving_statistics(model)
    with pytest.raises(error, match=message):
        recalibrate(model, dataset, verbose=0, **options)
    for name, statistics in syncbn.moving_statistics(model).items():
        np.testing.assert_array_equal(statistics.mean, before[name].mean)
        np.testing.assert_array_equal(statistics.variance, before[name].variance)


def failing():
    yield np.ones([3, 3])
    raise OSError("the disk is gone")


class Failing:
    def __iter__(self):
        yield np.ones([3, 3])
        raise OSError("the disk is gone")


@pytest.mark.parametrize("exact", [False, True])
def test_what_fails_on_one_worker_fails_on_all(replicas, scope, exact):
    model = small_model(scope)
    workers = job_of(model).workers()
    last = workers.size - 1
    here = workers.rank == last
    own_error = (OSError, "the disk") if here else (RuntimeError, f"an error on rank {last}")
    for others in [np.ones([2, 3])], []:  # without a batch they do not know the model's order
        dataset = [np.full([2, 3], np.nan)] if here else others
        require_error_on_all(model, dataset, ValueError, "inputs of first", exact=exact)
        dataset = Failing() if here else others
        require_error_on_all(model, dataset, *own_error, exact=exact)
    require_error_on_all(model, [], ValueError, "empty `dataset`", exact=exact)


def test_workers_that_make_different_calls_are_told_so(replicas, scope):
    model = small_model(scope)
    workers = job_of(model).workers()
    if workers.size == 1:
        pytest.skip("one worker agrees with itself")
    require_error_on_all(
        model, [np.ones([2, 3])], ValueError, "must have the same", exact=workers.rank == 0
    )
    model.get_layer("second").trainable = workers.rank == 0
    require_error_on_all(model, [np.ones([2, 3])], ValueError, "must have the same normalizations")
