"""Twelve steps of two layers in each rank, or three epochs of `fit`, with a fault of one rank.

usage: faulty_loop.py horovod|mpi|multiworker FAULT RANK FOLDER [MARK]

Checkpoints of `fit` go into FOLDER. MARK is there to be found in the list of processes.
"""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import syncbn
from syncbn import training

STEPS, FAULTY_STEP, FAULTY_EPOCH = 12, 4, 1


def stop(seconds=None):
    """Stops this process, and lets it go on after ``seconds``."""
    if seconds is not None:
        waker = f"sleep {seconds}; kill -CONT {os.getpid()}"
        subprocess.Popen(["/bin/sh", "-c", waker], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise ValueError("the fault")


def pipeline_that_fails():
    def batches():
        yield np.ones((8, 4), "float32")
        fail()

    signature = tf.TensorSpec([None, 4])
    for _ in tf.data.Dataset.from_generator(batches, output_signature=signature):
        pass


def fill_the_disk():
    """Lets no file of this process grow beyond a hundred bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


# What the rank does before its step, whatever its layers are then.
FAULTS = {
    "none": lambda: None,
    "raises": fail,
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
LAYERS = {
    "other order": ["second", "first"],
    "other order eagerly": ["second", "first"],
    "skips one": ["first"],
    "other channels": ["six channels", "second"],
    "other dtype": ["float64", "second"],
}
OF_FIT = {"callback raises": fail, "disk is full": fill_the_disk}


def loop(job, fault, faulty_rank):
    faulty = job.rank == faulty_rank
    with job.scope():
        layers = {
            name: syncbn.SyncBatchNormalization(name=name.split()[0], dtype=dtype)
            for name, dtype in {
                "first": "float32",
                "second": "float32",
                "six channels": "float32",
                "float64": "float64",
            }.items()
        }
        for name, layer in layers.items():
            layer.build((None, 6 if name == "six channels" else 4))

    def step_of(names):
        def replica(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = x
                for name in names:
                    y = tf.concat([y, y[:, :2]], 1) if name == "six channels" else y
                    y = tf.cast(layers[name](y, training=True)[:, :4], "float32")
            return tape.gradient(y, x, output_gradients=y + x)

        def step(x):
            return replica(x) if job.strategy is None else job.strategy.run(replica, args=(x,))

        return step if fault.endswith("eagerly") else tf.function(step)

    usual = ["first", "second"]
    right, wrong = step_of(usual), step_of(LAYERS.get(fault, usual))
    x = tf.random.stateless_normal([8, 4], [job.rank, 1])
    if fault == "is NaN" and faulty:
        x = x + float("nan")
    for number in range(STEPS):
        now = faulty and number == FAULTY_STEP
        if now:
            FAULTS.get(fault, FAULTS["none"])()
        (wrong if now else right)(x)
    return [layers[name].moving_mean for name in usual]


def fit(job, fault, faulty_rank, folder):
    def begin_epoch(epoch, logs=None):
        if epoch == FAULTY_EPOCH and job.rank == faulty_rank:
            OF_FIT[fault]()

    callbacks = [tf.keras.callbacks.LambdaCallback(on_epoch_begin=begin_epoch)]
    optimizer = tf.keras.optimizers.SGD(0.1)
    if job.strategy is None:
        optimizer = training.distribute(optimizer)
        callbacks.insert(0, training.BroadcastVariables())
    with job.scope():
        model = small_model()
        model.compile(optimizer, "mse")
        callbacks.append(training.PreemptionCheckpoint(Path(folder, "checkpoints")))
    x = np.random.default_rng(job.rank).normal(size=(32, 4)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    model.fit(data.with_options(options), epochs=3, verbose=0, callbacks=callbacks)
    return model.weights


def faulty_from_the_start(engine, faulty_rank):
    """Whether this is the faulty rank; engines know it once they have started."""
    launched = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK")
    ranks = [int(os.environ[name]) for name in launched if name in os.environ]
    if engine == "multiworker":
        ranks = [json.loads(os.environ["TF_CONFIG"])["task"]["index"]]
    return ranks[0] == faulty_rank


def small_model():
    layers = [syncbn.SyncBatchNormalization(), tf.keras.layers.Dense(4)]
    return tf.keras.Sequential([tf.keras.Input((4,)), *layers])


def main(engine, fault, rank, folder, *mark):
    if faulty_from_the_start(engine, int(rank)):
        time.sleep({"starts late": 8, "never begins": 1000}.get(fault, 0))
    job = training.start("tf.distribute" if engine == "multiworker" else engine)
    trained = functools.partial(fit, folder=folder) if fault in OF_FIT else loop
    values = trained(job, fault, int(rank))
    values = np.concatenate([np.ravel(value) for value in values]).round(4).tolist()
    # In one piece: launchers weave those of several ranks.
    sys.stdout.write(f"rank {job.rank} is done: {values}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
