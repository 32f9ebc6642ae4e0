"""The watchdog in a cluster of tf.distribute's, whose workers share what its coordinator keeps."""

from __future__ import annotations

import tensorflow as tf

# There is no public way to the keys and values of TensorFlow's coordination service, which a
# MultiWorkerMirroredStrategy starts. Tried with TensorFlow 2.21; tests/launchers/test_watchdog.py
# holds it.
from tensorflow.python.eager import context

from syncbn._src.watchdog.watchdog import WatchedJob, watch_job

_KEY = "syncbn/watchdog"


def watch_cluster() -> None:
    """Starts the watchdog of this worker, in the scope or a replica of its strategy."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    cluster = resolver.cluster_spec().as_dict()
    tasks = [(job, n) for job in ("chief", "worker") for n in range(len(cluster.get(job, ())))]
    hosts = {address.rpartition(":")[0] for job, _ in tasks for address in cluster[job]}

    def share(own: bytes | None) -> bytes:
        coordinator = context.context()
        if own is not None:
            coordinator.set_config_key_value(_KEY, own.decode())
        return coordinator.get_config_key_value(_KEY).encode()

    rank = tasks.index((resolver.task_type, resolver.task_id))
    own = cluster[tasks[0][0]][0].rpartition(":")[0]
    watch_job(WatchedJob("tf.distribute", rank, len(tasks), len(hosts) == 1, share, (own,)))
