"""`advise` in a job: of the data of all workers, and the same on all."""

import contextlib

import numpy as np
import pytest

import syncbn
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.models.training_job import job_of
from tests.keras import keras
from tests.kinds_of_replicas import Strategy
from tests.parallel.conftest import ENGINE

L = keras.layers
SAMPLES, AT_ONCE, RUNS = 3, 4, 2


def make_model():
    keras.utils.set_random_seed(1)
    layers = [L.BatchNormalization(name="a"), L.Dense(5, "tanh"), syncbn.SyncCentering(name="b")]
    return keras.Sequential([keras.Input((4,)), *layers])


def data_of(worker):
    """Of another mean and deviation on each worker."""
    x = np.random.default_rng(worker).normal(worker, 1 + worker, (RUNS * AT_ONCE * SAMPLES, 4))
    return x.astype("float32")


def figures(advice):
    errors = [error for layer in advice.layers for error in layer.errors]
    return np.array([number for error in errors for number in error if number is not None])


@pytest.fixture
def made(replicas):
    """A model of the job, and its workers."""
    own = replicas.strategy.scope if isinstance(replicas, Strategy) else contextlib.nullcontext
    with own():
        model = make_model()
    return model, job_of(model).workers()


def test_it_is_about_the_data_of_all_workers(replicas, made):
    model, workers = made
    options = {"batch": SAMPLES, "verbose": 0, "batches": RUNS * AT_ONCE}
    found = syncbn.advise(model, [data_of(workers.rank)], AT_ONCE, **options)
    every = all_gather(workers, figures(found), "test")
    np.testing.assert_array_equal(every, np.broadcast_to(every[:1], every.shape))

    together = np.concatenate([data_of(worker) for worker in range(workers.size)])
    options["batches"] *= workers.size
    alone = syncbn.advise(make_model(), [together], AT_ONCE, communicator="local", **options)
    np.testing.assert_allclose(figures(found), figures(alone), rtol=1e-5)
    assert alone.measured == ""
    assert [layer.seconds > 0 for layer in found.layers] == [True, True]
    size = job_of(model).size
    if size > 1:
        own = syncbn.advise(model, [data_of(0)], **options)
        assert (own.replicas, own.measured) == (size, job_of(model).communicator.name)


def test_a_worker_without_data_takes_part(made):
    model, workers = made
    own = [data_of(0)] if workers.rank == 0 else []
    found = syncbn.advise(model, own, 2, batch=SAMPLES, verbose=0)
    alone = syncbn.advise(
        make_model(), [data_of(0)], 2, communicator="local", batch=SAMPLES, verbose=0
    )
    np.testing.assert_allclose(figures(found), figures(alone), rtol=1e-5)


def test_an_error_on_one_worker_is_one_on_all(made):
    model, workers = made
    own = [data_of(0)] if workers.rank else data_of(0)
    expected = RuntimeError if workers.rank else TypeError
    with pytest.raises(expected, match=r"rank 0|iterable of batches"):
        syncbn.advise(model, own, 2, verbose=0)


@pytest.mark.skipif(ENGINE == "mirrored", reason="one worker")
def test_batches_of_other_sizes_are_an_error_on_all(made):
    model, workers = made
    with pytest.raises(ValueError, match=r"batches of one size. Received: workers with"):
        syncbn.advise(model, [data_of(0)[: 8 + workers.rank]], 2, verbose=0)
