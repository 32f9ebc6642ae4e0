"""A training call under ParameterServerStrategy is refused."""

import json
import os

import pytest
import tensorflow as tf

import syncbn
from syncbn._src.bundled.launch.process_groups import free_addresses

worker, server = free_addresses(2)
cluster = tf.train.ClusterSpec({"worker": [worker], "ps": [server]})
servers = [tf.distribute.Server(cluster, job, 0, start=True) for job in ("worker", "ps")]
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
strategy = tf.distribute.ParameterServerStrategy(resolver)
with strategy.scope():
    layer = syncbn.SyncBatchNormalization()
    layer.build((None, 3))
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": [worker, worker], "ps": [server]}})
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)


def train():
    coordinator.schedule(tf.function(lambda: layer(tf.ones([2, 3]), training=True)))
    coordinator.join()


with pytest.raises(RuntimeError, match="ParameterServerStrategy, whose workers are asynchronous"):
    train()
print("refused", flush=True)
os._exit(0)  # the servers have no end of their own
