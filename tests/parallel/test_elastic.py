"""`ElasticState` and `elastic` in jobs of fixed size: the state of rank 0, once."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.optimizer_state import optimizer_variables
from tests.keras import keras
from tests.parallel import workers
from tests.parallel.conftest import ENGINE
from tests.parallel.workers import compiled, same_on_all_ranks, samples


def test_the_state_is_restored_on_every_engine(replicas):
    strategy = getattr(replicas, "strategy", None)
    keras.utils.set_random_seed(0)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        model = compiled()
    x, y = samples(8)

    def values():
        return [one.numpy() for one in (*model.weights, *optimizer_variables(model.optimizer))]

    @training.elastic
    def train(state):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        state.epoch = 2
        state.commit()
        committed = values()
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        assert not np.array_equal(values()[0], committed[0])
        state.restore()
        for ours, theirs in zip(values(), committed, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        return values()[0]

    state = training.ElasticState(model)
    once = train(state)
    assert state.epoch == 2
    # Also on the per-replica copies, from which training goes on alike.
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    again = values()[0]
    state.restore()
    np.testing.assert_allclose(values()[0], once, rtol=1e-6)
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    np.testing.assert_allclose(values()[0], again, rtol=1e-6)


@workers.in_separate_processes
@workers.on_one_level
def test_all_workers_begin_with_the_state_of_rank_0(replicas):
    keras.utils.set_random_seed(replicas.rank)  # each worker with weights of its own
    optimizer = training.distribute(keras.optimizers.Adam(0.1), "local")
    model = compiled(keras.layers.BatchNormalization(), optimizer=optimizer)
    if replicas.rank == 0:  # which has been there before
        model.fit(*samples(8), batch_size=4, verbose=0)
        optimizer.learning_rate = 0.02
    text = "ä" * 1000
    state = training.ElasticState(model, text=None, nested={"a": [replicas.rank, None, True]})
    if replicas.rank == 0:
        state.epoch, state.batch, state.text = 7, 3, text
    calls = []

    @training.elastic
    def train(state):
        calls.append(state.epoch)
        return replicas.rank

    assert train(state) == replicas.rank
    assert calls == [7]
    assert (state.batch, state.text, state.nested) == (3, text, {"a": [0, None, True]})
    variables = [*model.weights, *optimizer_variables(model.optimizer)]
    assert any(np.any(one.numpy()) for one in optimizer_variables(model.optimizer))
    for variable in variables:
        same_on_all_ranks(variable.numpy())
    assert float(optimizer.learning_rate) == np.float32(0.02)
    # And that is what is committed.
    kept = model.get_weights()
    model.set_weights([weight + 1 for weight in kept])
    state.epoch = 9
    state.restore()
    assert state.epoch == 7
    for weight, value in zip(model.get_weights(), kept, strict=True):
        np.testing.assert_array_equal(weight, value)


@workers.in_separate_processes
@workers.on_one_level
def test_workers_with_other_models_are_told(replicas):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1 + (replicas.rank == 0))])
    state = training.ElasticState(model, keras.optimizers.SGD())
    with pytest.raises(ValueError, match="must have the same variables"):
        state.sync()


@pytest.mark.skipif(ENGINE != "multiworker", reason="other engines send the state")
def test_a_strategy_compares_what_its_workers_begin_with(replicas):
    rank = replicas.strategy.cluster_resolver.task_id
    with replicas.strategy.scope():
        model = compiled()
    training.elastic(lambda state: None)(training.ElasticState(model, epoch=3))
    # As where rank 0 alone has found a checkpoint.
    state = training.ElasticState(model, epoch=3 * (rank == 0))
    with pytest.raises(ValueError, match=r"same state to begin with.*its values, "):
        state.sync()
    kernel = keras_api.variable(model.layers[0].kernel)
    for copy in replicas.strategy.experimental_local_results(kernel):
        copy.assign_add(tf.fill(copy.shape, float(rank)))
    state = training.ElasticState(model)
    with pytest.raises(ValueError, match=r"same state to begin with.*kernel.*of checksum "):
        state.sync()
