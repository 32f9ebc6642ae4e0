"""Two workers, of which only one has a synchronized layer; the weights have the same shapes."""

import os

import numpy as np
import tensorflow as tf

import syncbn
from syncbn import training

if "HOROVOD_SIZE" in os.environ:
    import horovod.tensorflow as hvd

    hvd.init()
    rank = hvd.rank()
else:
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
layer = tf.keras.layers.BatchNormalization() if rank else syncbn.SyncBatchNormalization()
model = tf.keras.Sequential([tf.keras.Input((3,)), layer])
model.compile(training.distribute(tf.keras.optimizers.SGD(0.1)), "mse")
x = np.ones((4, 3), "float32")
model.fit(x, x, verbose=0, callbacks=[training.BroadcastVariables()])
