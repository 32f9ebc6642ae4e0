"""`syncbn.assert_synchronized`: whether all replicas have the same statistics."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.models.agreement import assert_synchronized
from tests.keras import keras
from tests.kinds_of_replicas import Threads


def built(*sizes, norm=syncbn.SyncBatchNormalization):
    parts = [part for n, size in enumerate(sizes) for part in (dense(size), norm(name=f"norm{n}"))]
    return keras.Sequential([keras.Input((3,)), *parts])


def dense(size):
    return keras.layers.Dense(size, kernel_initializer="ones")


def errors(models, **options):
    """What each of the workers, which are threads here, is told about its model."""
    replicas = Threads(len(models))

    def worker(rank):
        try:
            assert_synchronized(models[rank], replicas.communicator(rank), **options)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(models)) as threads:
        return list(threads.map(worker, range(len(models))))


def test_equal_models_pass_with_one_small_collective():
    models = [built(4, 2), built(4, 2), built(4, 2)]
    assert errors(models) == [None] * 3
    communicator = Threads(1).communicator(0)
    assert_synchronized(models[0], communicator)
    assert communicator.payloads == [17]


def test_the_first_layer_and_rank_that_differ_are_named_on_all_workers():
    models = [built(4, 2, 2) for _ in range(3)]
    models[2].get_layer("norm1").moving_variance.assign([1, 5])
    models[1].get_layer("norm2").moving_mean.assign([3, 0])
    for message in errors(models):
        assert "another moving_variance of norm1 on rank 2 than on rank 0" in message
        assert "2 of 6 differ, on rank 1, 2" in message


def test_the_last_bit_counts_and_equal_nans_are_equal():
    models = [built(2), built(2)]
    for model in models:
        model.get_layer("norm0").moving_mean.assign([np.nan, 1])
    assert errors(models) == [None] * 2
    models[1].get_layer("norm0").moving_mean.assign([np.nan, np.nextafter(np.float32(1), 2)])
    assert all("moving_mean of norm0 on rank 1" in message for message in errors(models))


def test_other_weights_are_compared_where_that_is_asked_for():
    models = [built(2), built(2)]
    models[1].layers[0].bias.assign([0, 1])
    assert errors(models) == [None] * 2
    for message in errors(models, weights=True):
        assert "The weights must be the same" in message
        assert "bias" in message


@pytest.mark.parametrize("sizes", [(4, 3), (4,), (4, 2, 2)], ids=str)
def test_workers_with_other_models_are_told_so(sizes):
    for message in errors([built(4, 2), built(*sizes)]):
        assert "All replicas must have the same model" in message
        assert "on rank 1 than on rank 0" in message


def test_plain_batch_normalization_drifts_apart_under_a_strategy(mirrored):
    replicas = mirrored(2)
    messages = {}
    for norm in syncbn.SyncBatchNormalization, keras.layers.BatchNormalization:
        with replicas.strategy.scope():
            model = built(2, norm=norm)
        assert_synchronized(model, weights=True)
        x = replicas.strategy.experimental_distribute_values_from_function(
            lambda context: tf.fill([2, 3], float(context.replica_id_in_sync_group))
        )
        replicas.strategy.run(lambda x, model=model: model(x, training=True), args=[x])
        try:
            assert_synchronized(model)
        except ValueError as error:
            messages[norm] = str(error)
    assert list(messages) == [keras.layers.BatchNormalization]
    assert "another moving_mean of norm0 on rank 1" in messages[keras.layers.BatchNormalization]


def test_it_is_not_silent_where_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match=r"must have moving statistics to compare.*Build it first"):
        assert_synchronized(keras.Sequential([syncbn.SyncBatchNormalization()]))


def test_it_is_made_between_steps(mirrored):
    model = built(2)
    with pytest.raises(RuntimeError, match="must be called eagerly"):
        tf.function(lambda: assert_synchronized(model))()
    with pytest.raises(RuntimeError, match="must be called eagerly"):
        mirrored(2).strategy.run(lambda: assert_synchronized(model))
