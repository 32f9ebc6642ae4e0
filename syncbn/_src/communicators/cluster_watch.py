"""The watchdog in a cluster of tf.distribute's, whose workers share what its coordinator keeps."""

from __future__ import annotations

import tensorflow as tf

# There is no public way to the keys and values of TensorFlow's coordination service, which a
# MultiWorkerMirroredStrategy starts. Tried with TensorFlow 2.21; tests/launchers/test_watchdog.py
# holds it.
from tensorflow.python.eager import context

from syncbn._src.communicators.strategy import cluster_workers
from syncbn._src.watchdog.watchdog import WatchedJob, watch_job

_KEY = "syncbn/watchdog"


def watch_cluster() -> None:
    """Starts the watchdog of this worker, in the scope or a replica of its strategy."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    workers = cluster_workers()
    hosts = list(workers.values())

    def share(own: bytes | None) -> bytes:
        coordinator = context.context()
        if own is not None:
            coordinator.set_config_key_value(_KEY, own.decode())
        return coordinator.get_config_key_value(_KEY).encode()

    rank = list(workers).index((resolver.task_type, resolver.task_id))
    one_host = len(set(hosts)) == 1
    watch_job(WatchedJob("tf.distribute", rank, len(hosts), one_host, share, (hosts[0],)))
