"""Workers of tf.distribute that do different things: their job ends, and each says why."""

import sys

from tests import processes

# Rank 1 alone calls the layers otherwise, at step 4. tests/parallel/test_mixups.py has what a job
# survives; TensorFlow's workers do not go on after an error inside of a graph.
LOOP = """
import os, sys
import tensorflow as tf, syncbn

strategy = tf.distribute.MultiWorkerMirroredStrategy()
rank, other = strategy.cluster_resolver.task_id, sys.argv[1]
with strategy.scope():
    layers = {name: syncbn.SyncBatchNormalization(name=name, momentum=0.5) for name in "ab"}
    for layer in layers.values():
        layer.build((None, 3))

@tf.function
def step(x, calls):
    def replica(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = {name: layers[name](x, training=True) for name in calls}
            loss = tf.add_n([tf.reduce_sum(outputs[name] ** 3) for name in sorted(outputs)])
        return tape.gradient(loss, x)
    return strategy.run(replica, args=(x,))

for number in range(12):
    try:
        step(tf.random.normal([4, 3]), other if (rank, number) == (1, 4) else "ab")
    except Exception as error:
        print("rank", rank, "ended in step", number, error, flush=True)
        os._exit(3)
print("rank", rank, "finished", flush=True)
"""


def test_another_order_ends_the_job_in_that_step_on_all_workers():
    commands = processes.workers(2, sys.executable, "-c", LOOP, "ba")
    finished = processes.run(commands, takes=20)
    assert finished.code == 3, finished.output
    assert "finished" not in finished.output, finished.output
    for rank, here, there in (0, "a", "b"), (1, "b", "a"):
        assert f"rank {rank} ended in step 4" in finished.output, finished.output
        call = "syncbn/{}/statistics, float64 (7,)"
        told = f"Received: {call.format(here)} here, and {call.format(there)} on 1 of 2 replicas"
        assert told in finished.output, finished.output
