"""A job that is told to end in the middle, or goes on to its end, as it finds its folder.

usage: preempted.py FOLDER WHOM SIGNAL

Before the fourth step of epoch 2 rank 1, if there is one, sends the signal to WHOM: "self", or
"launcher", the process whose number is in the environment's LAUNCHER. A job that goes on compares
its weights with those of one process that nobody has interrupted.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import syncbn
from syncbn import training

SAMPLES, BATCH, EPOCHS = 120, 12, 3
folder, whom, name = sys.argv[1:]
job = training.start()
keras = tf.keras
rng = np.random.default_rng(3)
x = rng.normal(2, 3, (SAMPLES, 3)).astype("float32")
y = rng.normal(size=(SAMPLES, 2)).astype("float32")


def make(norm):
    keras.utils.set_random_seed(5)
    layers = [keras.layers.Dense(4), norm, keras.layers.Activation("tanh"), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers])


def batches(preemption):
    numbers = preemption.indices(SAMPLES, BATCH, EPOCHS, seed=7)
    return numbers.map(lambda index: (tf.gather(x, index), tf.gather(y, index)))


class Signal(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch, job.rank) == (1, 3, min(1, job.size - 1)):
            to = os.getpid() if whom == "self" else int(os.environ["LAUNCHER"])
            os.kill(to, signal.Signals[name])
        # The launcher takes a while to pass it on.
        time.sleep(0.4 if (self.epoch, batch) >= (1, 3) else 0.25)


began = bool(list(Path(folder).glob("checkpoint-*")))
print("goes on" if began else "begins", "with", job.size, flush=True)
with job.scope():
    model = make(syncbn.SyncBatchNormalization(momentum=0.8))
    model.compile(training.distribute(keras.optimizers.SGD(0.05, momentum=0.9)), "mse")
    preemption = training.PreemptionCheckpoint(folder)
    data = batches(preemption)
callbacks = [training.BroadcastVariables(), *([] if began else [Signal()])]
model.fit(
    data,
    epochs=EPOCHS,
    steps_per_epoch=SAMPLES // BATCH,
    callbacks=[*callbacks, preemption],
    shuffle=False,
    verbose=0,
)
alone = make(keras.layers.BatchNormalization(momentum=0.8))
alone.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
one = training.PreemptionCheckpoint(f"{folder}-{job.rank}", communicator="local")
alone.fit(batches(one), epochs=EPOCHS, steps_per_epoch=SAMPLES // BATCH, shuffle=False, verbose=0)
for ours, theirs in zip(model.get_weights(), alone.get_weights(), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
print("the same weights", flush=True)
