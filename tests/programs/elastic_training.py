"""Training in an elastic job that loses a worker, gets one, and has one taken away.

``python -m tests.programs.elastic_training FOLDER SLOTS FAULT STEP``, in each worker

It begins with SLOTS workers on localhost, and one on 127.0.0.1, which has a FAULT before STEP: one
of FAULTS. Then rank 0 changes ``FOLDER/hosts``, which the discovery script shows, so that localhost
has one more, and one less; training goes on until the job has had all sizes. Epochs of five steps
are trained by `fit` and by a loop in turn. ``FOLDER/initial.npz`` and ``final.npz`` have the
variables, and ``sizes.json`` the number of workers in each step that counts.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.watchdog.watchdog import described
from tests import kinds_of_replicas as kinds
from tests.elastic_truth import MOMENTUM, RATE, batch
from tests.keras import keras

FOLDER, SLOTS, FAULT, FAULT_AT = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
FAULTS = {
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(100000),
    "keeps Python's lock": lambda: ctypes.PyDLL(None).sleep(100000),
}
STEPS = 5  # of an epoch
AT_LEAST = 4  # steps with each size
# The sizes that the job has, one after the other, and the slots of localhost that are discovered
# when it has had each for a while.
SIZES, NEXT_SLOTS = [SLOTS + 1, SLOTS] * 2, [None, SLOTS + 1, SLOTS, None]


def variables(model):
    dense, norm, last = model.layers[-3:]
    named = {
        "kernel": dense.kernel,
        "gamma": norm.gamma,
        "beta": norm.beta,
        "moving_mean": norm.moving_mean,
        "moving_variance": norm.moving_variance,
        "last_kernel": last.kernel,
        "last_bias": last.bias,
    }
    return {name: variable.numpy() for name, variable in named.items()}


def built():
    layers = [
        keras.layers.Dense(4, use_bias=False),
        syncbn.SyncBatchNormalization(momentum=0.9),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    optimizer = training.distribute(keras.optimizers.SGD(RATE, momentum=MOMENTUM))
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def before_step(state, job):
    """Does what is to happen to the job before the next step."""
    number, step = len(state.seen) - 1, len(state.history)
    if os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1" and step == FAULT_AT:
        FAULTS[FAULT]()
    if NEXT_SLOTS[number] and job.rank == 0 and step - state.since >= AT_LEAST:
        (FOLDER / "next").write_text(f"localhost:{NEXT_SLOTS[number]}\n")
        (FOLDER / "next").rename(FOLDER / "hosts")
    if number > 0:
        time.sleep(0.02)  # or there would be thousands of steps until it is discovered


class Steps(keras.callbacks.Callback):
    def __init__(self, state, job):
        super().__init__()
        self.state, self.job = state, job

    def on_train_batch_begin(self, batch, logs=None):
        before_step(self.state, self.job)

    def on_train_batch_end(self, batch, logs=None):
        self.state.history.append(self.job.size)


def fit_epoch(state, job, model):
    steps = range(len(state.history), len(state.history) + STEPS - state.batch)
    x, y = (np.stack(parts) for parts in zip(*(batch(s, job.rank) for s in steps), strict=True))
    callbacks = [
        training.BroadcastVariables(),
        training.AverageMetrics(),
        Steps(state, job),
        training.CommitState(state, batches_per_commit=2),
    ]
    model.fit(
        tf.data.Dataset.from_tensor_slices((x, y)),
        initial_epoch=state.epoch,
        epochs=state.epoch + 1,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


model = None


@tf.function  # made, and maybe traced, in a job of another size
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    weights = model.trainable_variables
    model.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


def loop_epoch(state, job, model):
    while state.batch < STEPS:
        before_step(state, job)
        train_step(*map(tf.constant, batch(len(state.history), job.rank)))
        state.history.append(job.size)
        state.batch += 1
        if state.batch % 2 == 0:
            state.commit()
    state.epoch, state.batch = state.epoch + 1, 0
    state.commit()


@training.elastic
def train(state):
    job = training.start()
    if not state.seen or state.seen[-1] != job.size:
        state.seen.append(job.size)
        state.since = len(state.history)
    watched = described(job.size > 1)
    print(f"now {job.size} workers, in step {len(state.history)}, watchdog {watched}", flush=True)
    while state.seen != SIZES or len(state.history) - state.since < AT_LEAST:
        (loop_epoch if state.epoch % 2 else fit_epoch)(state, job, state.model)
    return job


class TheFaultError(Exception):
    """A user's, which TensorFlow reports as UnknownError, as it does a lost message."""


def require_own_errors_are_raised(state):
    calls = []

    @tf.function
    def fails():
        return tf.numpy_function(raises, [], tf.float32)

    def raises():
        raise TheFaultError("mine")

    @training.elastic
    def function(state):
        calls.append(state)
        return fails()

    with pytest.raises(tf.errors.UnknownError, match="mine"):
        function(state)
    assert len(calls) == 1


def require_what_has_one_size_is_refused():
    import horovod.tensorflow as hvd

    with pytest.raises(NotImplementedError, match="Process sets end with each change"):
        syncbn.HorovodCommunicator(hvd.ProcessSet([0]))
    layer = syncbn.SyncBatchNormalization(group_size=1)
    with pytest.raises(NotImplementedError, match="a layer with groups in an elastic job"):
        layer(tf.ones([2, 3]), training=True)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope(), pytest.raises(NotImplementedError, match="each process has one replica"):
        syncbn.resolve()


if __name__ == "__main__":
    kinds.use_logical_devices(2)
    job = training.start()
    keras.utils.set_random_seed(0)
    model = built()
    if not (FOLDER / "initial.npz").exists() and job.rank == 0:
        np.savez(FOLDER / "initial.npz", **variables(model))
    state = training.ElasticState(model, history=[], seen=[], since=0)
    job = train(state)
    require_own_errors_are_raised(state)
    require_what_has_one_size_is_refused()
    if job.rank == 0:
        np.savez(FOLDER / "final.npz", **variables(model))
        (FOLDER / "sizes.json").write_text(json.dumps(state.history))
