"""`check_equivalence` where the replicas are the workers of a job."""

import numpy as np
import pytest

import syncbn
from syncbn._src.models.equivalence import diagnosis
from syncbn._src.models.equivalence.check import check_equivalence
from tests.keras import keras
from tests.parallel import workers

pytestmark = workers.in_separate_processes


def build(distributed=True):
    def make():
        layers = [keras.layers.Dense(3), syncbn.SyncBatchNormalization(), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        optimizer = keras.optimizers.SGD(0.1)
        model.compile(syncbn.training.distribute(optimizer) if distributed else optimizer, "mse")
        return model

    return make


def batch(size):
    generator = np.random.default_rng(0)
    return generator.normal(2, 3, size=(4 * size, 4)), generator.normal(size=(4 * size, 2))


def test_workers_that_do_what_one_does(replicas):
    found = check_equivalence(build(), batch(replicas.size), replicas.size)
    assert found.equivalent, found
    assert diagnosis.TRAINING in {row.quantity for row in found.rows}


def test_an_optimizer_that_is_not_distributed_is_found_on_all_workers(replicas):
    found = check_equivalence(build(distributed=False), batch(replicas.size), replicas.size)
    assert {row.quantity for row in found.rows if not row.ok} == {diagnosis.TRAINING}
    assert "syncbn.training.distribute(optimizer)" in found.advice[0]


def test_an_unequal_split(replicas):
    x, _ = batch(replicas.size)
    split = [len(x)] + [0] * (replicas.size - 1)
    found = check_equivalence(build(), x, replicas.size, split=split)
    assert found.equivalent, found


def test_all_start_from_the_weights_of_the_first_worker(replicas):
    def make():
        start = keras.initializers.Constant(np.nan if replicas.rank else 1.0)
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, bias_initializer=start)])

    x, _ = batch(replicas.size)
    found = check_equivalence(make, x, replicas.size)
    assert found.equivalent, found


def test_workers_must_build_the_same_model(replicas):
    x, _ = batch(replicas.size)
    layer = keras.layers.Dense(3 + replicas.rank)
    with pytest.raises(ValueError, match="All workers must have the same variables"):
        check_equivalence(lambda: keras.Sequential([keras.Input((4,)), layer]), x, replicas.size)


def test_workers_must_give_the_same_batch_and_their_number(replicas):
    x, _ = batch(replicas.size)
    with pytest.raises(ValueError, match="All workers must have the same batches"):
        check_equivalence(build(), x + replicas.rank, replicas.size)
    with pytest.raises(ValueError, match=f"in a job of {replicas.size}"):
        check_equivalence(build(), x, 1 + replicas.size, split=[len(x)] + [0] * replicas.size)
