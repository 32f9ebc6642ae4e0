"""Choosing an engine, and what the engines have in common."""

import json
import logging

import pytest
import tensorflow as tf

import syncbn
from syncbn.communicators import launcher
from syncbn.communicators import resolve as _  # noqa: F401  (the function hides its module)
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
    import sys

    from syncbn.communicators import resolve as function

    module = sys.modules[function.__module__]
    module._engine.cache_clear()
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


def test_every_communicator_keeps_the_protocol():
    assert isinstance(syncbn.LocalCommunicator(), syncbn.Communicator)
    assert isinstance(syncbn.DistributeCommunicator(), syncbn.Communicator)
    assert not isinstance(keras.layers.Layer(), syncbn.Communicator)
