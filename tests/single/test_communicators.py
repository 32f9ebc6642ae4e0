"""Choosing an engine, and what the engines have in common."""

import functools
import json
import logging
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators import launcher, resolution
from syncbn._src.communicators.host_collectives import sum_of_all
from syncbn._src.communicators.order import Order
from syncbn._src.communicators.resolution import choose_engine
from syncbn._src.communicators.strategy import cluster_workers
from tests.keras import keras


def test_alone_auto_is_local():
    communicator = syncbn.resolve()
    assert (communicator.name, communicator.size, communicator.rank) == ("local", 1, 0)
    x = tf.constant([1.0])
    assert communicator.all_reduce_sum(x, "x") is x


def test_the_replicas_of_a_strategy_come_first(mirrored):
    strategy = mirrored(2).strategy
    names = []
    strategy.run(lambda: names.append(syncbn.resolve().name))
    assert names == ["tf.distribute"] * 2


def test_a_strategy_with_one_replica_is_one_replica():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        assert syncbn.resolve().name == "local"
        layer = syncbn.SyncCentering(communicator="tf.distribute")
        layer.build((None, 1))
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    y = strategy.run(lambda: layer(tf.constant([[1.0], [3.0]]), training=True))
    assert y.numpy().tolist() == [[-1.0], [1.0]]


def test_a_communicator_is_taken_as_it_is():
    local = syncbn.LocalCommunicator()
    assert syncbn.resolve(local) is local


def test_the_choice_is_logged_once(caplog):
    resolution._engine.cache_clear()
    with caplog.at_level(logging.INFO, "syncbn"):
        layers = [syncbn.SyncCentering() for _ in range(3)]
        for layer in layers:
            layer(tf.ones([2, 3]), training=True)
    assert [record.getMessage() for record in caplog.records] == [
        "syncbn synchronizes with 'local'"
    ]


def test_tensorflow_distribute_outside_of_replicas_is_refused(mirrored):
    with mirrored(2).strategy.scope():
        communicator = syncbn.DistributeCommunicator()
        assert communicator.size == 2
        syncbn.SyncCentering(communicator=communicator)
        with pytest.raises(RuntimeError, match="replica context"):
            communicator.all_reduce_sum(tf.ones([1]), "x")


def joined_by(monkeypatch, engine, size):
    """As if an engine had joined so many processes."""
    hvd = SimpleNamespace(is_initialized=lambda: True, size=lambda: size)
    mpi = SimpleNamespace(
        Is_initialized=lambda: True,
        Is_finalized=lambda: False,
        COMM_WORLD=SimpleNamespace(size=size),
    )
    module, stand_in = {"horovod": ("horovod.tensorflow", hvd), "mpi": ("mpi4py.MPI", mpi)}[engine]
    monkeypatch.setitem(sys.modules, module, stand_in)


@pytest.mark.parametrize("engine", ["horovod", "mpi"])
def test_an_engine_joins_the_replicas_of_several_processes(mirrored, monkeypatch, engine):
    joined_by(monkeypatch, engine, 2)
    with mirrored(2).strategy.scope():
        assert choose_engine() == engine
        for given in "tf.distribute", syncbn.DistributeCommunicator():
            with pytest.raises(RuntimeError, match=f"joins 1 of the 2 processes that {engine} joi"):
                syncbn.resolve(given)
        assert syncbn.resolve("local").name == "local"
    joined_by(monkeypatch, engine, 1)
    with mirrored(2).strategy.scope():
        assert syncbn.resolve().name == "tf.distribute"


@pytest.mark.parametrize("given", ["auto", "tf.distribute"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}}'),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("HOROVOD_SIZE", "2"),
    ],
)
def test_a_strategy_of_one_process_in_a_job_of_several(
    mirrored, monkeypatch, given, variable, value
):
    monkeypatch.setenv(variable, value)
    kind = mirrored(2)
    layers = kind.build(lambda rank: syncbn.SyncCentering(communicator=given), (None, 1))
    message = (
        rf"{variable} says that 2 processes.*MirroredStrategy joins the 2 replicas of one process"
        rf".*init\(\).*MultiWorkerMirroredStrategy.*unset {variable}"
    )
    with pytest.raises(RuntimeError, match=message):
        kind.run(lambda layer, x: layer(x, training=True), layers, [(tf.ones([2, 1]),)] * 2)
    kind.run(lambda layer, x: layer(x), layers, [(tf.ones([2, 1]),)] * 2)  # at inference


HOSTS = ["a:1", "b:1", "c:1"]


@pytest.mark.parametrize(
    ("config", "processes"),
    [
        ({"cluster": {"worker": HOSTS, "ps": HOSTS}}, 3),
        ({"cluster": {"worker": HOSTS, "chief": ["d:1"]}}, 4),
        ({"cluster": {"worker": {"0": "a:1", "1": "b:1"}}}, 2),
        # What says nothing, or is for TensorFlow to refuse.
        *((config, 1) for config in ({}, [], None, 3, "text", {"cluster": {}})),
        *(({"cluster": cluster}, 1) for cluster in (None, 3, "text", HOSTS)),
        *(({"cluster": {"worker": tasks}}, 1) for tasks in (None, 3, "host:1234", ["a:1"])),
    ],
    ids=str,
)
def test_tf_config_tells_how_many_processes_there_are(config, processes, monkeypatch):
    for name in launcher._SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert launcher.launched().processes == processes
    if processes == 1:
        assert syncbn.resolve().name == "local"
    for text in "", "{":
        monkeypatch.setenv("TF_CONFIG", text)
        assert launcher.launched().processes == 1


def test_the_workers_of_a_cluster_may_leave_numbers_out(monkeypatch):
    cluster = tf.train.ClusterSpec(
        {"worker": {3: "c:1", 1: "b:2"}, "chief": ["a:1"], "ps": ["d:1"]}
    )
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster)
    strategy = SimpleNamespace(cluster_resolver=resolver, num_replicas_in_sync=6)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    workers = {("chief", 0): "a", ("worker", 1): "b", ("worker", 3): "c"}
    assert list(cluster_workers().items()) == list(workers.items())
    assert syncbn.DistributeCommunicator().hosts() == ["a", "a", "b", "b", "c", "c"]


def test_every_communicator_keeps_the_protocol():
    assert isinstance(syncbn.LocalCommunicator(), syncbn.Communicator)
    assert isinstance(syncbn.DistributeCommunicator(), syncbn.Communicator)
    assert not isinstance(keras.layers.Layer(), syncbn.Communicator)


def test_a_failure_of_ones_own_is_not_hidden_by_that_of_the_collective():
    class Failing:
        name, supports_jit, size, rank, finds_mixups = "local", False, 2, 0, True

        def all_reduce_sum(self, tensor, name):
            raise ConnectionError("the others are gone")

    def own():
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data") as raised:
        sum_of_all(Failing(), own, 1, "this")
    assert isinstance(raised.value.__cause__, ConnectionError)
    with pytest.raises(ConnectionError, match="the others are gone"):
        sum_of_all(Failing(), lambda: np.zeros(1), 1, "this")


def test_a_sum_waits_for_those_in_second_derivatives_of_a_nested_function():
    # TensorFlow makes them without automatic control dependencies, and dw does not need the last.
    order, calls = Order(), []

    def run(name, value):
        time.sleep(0.1 * (calls.count(name) == 1))
        calls.append(name)
        return value

    def add_up(tensor, name, witness):
        total = tf.numpy_function(functools.partial(run, name), [tensor], tensor.dtype)
        total.set_shape(tensor.shape)
        return total

    @tf.function
    def nested(x, w):
        return order.turn().all_reduce_sum(add_up, x, "nested") ** 2 * w

    @tf.function
    def step(x, w):
        with tf.GradientTape() as outer:
            outer.watch([x, w])
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = nested(x, w)
            penalty = tape.gradient(y, x) ** 2
        dx, dw = outer.gradient(penalty, [x, w])
        return dx, order.turn().all_reduce_sum(add_up, dw, "outside")

    dx, dw = step(tf.constant([2.0]), tf.constant([3.0]))
    assert (dx.numpy(), dw.numpy()) == ([144.0], [96.0])  # of 4 x^2 w^2
    assert calls[-1] == "outside", calls
