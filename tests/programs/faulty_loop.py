"""Twelve steps of two layers in each rank, with a fault of rank 1 at step 4.

usage: faulty_loop.py horovod|mpi|multiworker FAULT
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf

import syncbn

STEPS, FAULTY_STEP = 12, 4


def start(engine):
    if engine == "multiworker":
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return strategy.cluster_resolver.task_id, strategy
    if engine == "mpi":
        from mpi4py import MPI

        return MPI.COMM_WORLD.rank, None
    import horovod.tensorflow as hvd

    hvd.init()
    return hvd.rank(), None


def stop(seconds=None):
    """Stops this process, and lets it go on after ``seconds``."""
    if seconds is not None:
        waker = f"sleep {seconds}; kill -CONT {os.getpid()}"
        subprocess.Popen(["/bin/sh", "-c", waker], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(error):
    raise error


def pipeline_that_fails():
    def batches():
        yield np.ones((8, 4), "float32")
        raise ValueError("the fault")

    signature = tf.TensorSpec([None, 4])
    for _ in tf.data.Dataset.from_generator(batches, output_signature=signature):
        pass


# What rank 1 does before its step, whatever its layers are then.
FAULTS = {
    "none": lambda: None,
    "raises": lambda: fail(ValueError("the fault")),
    "pipeline raises": pipeline_that_fails,
    "out of memory": lambda: tf.zeros([1 << 45]),
    "ends": sys.exit,
    "exits with 3": lambda: sys.exit(3),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": stop,
    "is stopped for 8 s": lambda: stop(8),
    "sleeps": lambda: time.sleep(1000),
    "is slow": lambda: time.sleep(3),
}
LAYERS = {"other order": [1, 0], "skips one": [0], "other channels": [2, 1]}


def main(engine, fault):
    rank, strategy = start(engine)
    if fault == "starts late" and rank == 1:
        time.sleep(15)
    with strategy.scope() if strategy else contextlib.nullcontext():
        layers = [syncbn.SyncBatchNormalization(name=name) for name in ("first", "second", "third")]
        for layer, channels in zip(layers, (4, 4, 6), strict=True):
            layer.build((None, channels))

    def step_of(numbers):
        def replica(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = x
                for number in numbers:
                    y = layers[number](
                        y if number < 2 else tf.concat([y, y[:, :2]], 1), training=True
                    )
                    y = y[:, :4]
            return tape.gradient(y, x, output_gradients=y + x)

        if strategy is None:
            return tf.function(replica)
        return tf.function(lambda x: strategy.run(replica, args=(x,)))

    right, wrong = step_of([0, 1]), step_of(LAYERS.get(fault, [0, 1]))
    x = tf.random.stateless_normal([8, 4], [rank, 1])
    if fault == "is NaN" and rank == 1:
        x = x + float("nan")
    for number in range(STEPS):
        faulty = rank == 1 and number == FAULTY_STEP
        if faulty:
            FAULTS.get(fault, FAULTS["none"])()
        (wrong if faulty else right)(x)
    values = [np.asarray(layer.moving_mean) for layer in layers]
    # In one piece: launchers weave those of several ranks.
    sys.stdout.write(f"rank {rank} is done: {np.concatenate(values).round(4).tolist()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
