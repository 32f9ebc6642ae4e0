"""A job over Horovod, initialized as the argument says, and what its report says of settings."""

import sys

import horovod.tensorflow as hvd
import tensorflow as tf

import syncbn

if sys.argv[1] == "ours":
    syncbn.training.init_horovod()
else:
    hvd.init()
layer = syncbn.SyncCentering()
for _ in range(2):
    layer(tf.ones([2, 3]), training=True)
syncbn.HorovodCommunicator()
model = tf.keras.Sequential([tf.keras.Input((3,)), layer])
report = syncbn.report(model, "auto")
if hvd.rank() == 0:
    print("report:", report.settings)
