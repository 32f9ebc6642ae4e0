"""Horovod with its own parts for Keras, which work with tf_keras only.

TF_USE_LEGACY_KERAS=1 horovodrun --gloo -np 2 python horovod_before.py FOLDER
"""

import sys

import horovod.tensorflow
import horovod.tensorflow.keras as hvd
import tensorflow as tf
from images import load_images

hvd.init()
gpus = tf.config.list_physical_devices("GPU")
if gpus:  # a GPU for each rank
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
tf.keras.mixed_precision.set_global_policy("mixed_float16" if gpus else "mixed_bfloat16")

training, validation = (
    tf.data.Dataset.from_tensor_slices(part).shard(hvd.size(), hvd.rank()) for part in load_images()
)
training = training.shuffle(384, seed=0).batch(8, drop_remainder=True).prefetch(2)
validation = validation.batch(8, drop_remainder=True).prefetch(2)

layers = tf.keras.layers
model = tf.keras.Sequential([tf.keras.Input((8, 8, 1))])
for filters in 8, 16:
    model.add(layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
    model.add(horovod.tensorflow.SyncBatchNormalization(momentum=0.9, name=f"bn_{filters}"))
    model.add(layers.ReLU())
model.add(layers.Flatten())
model.add(layers.Dense(3, dtype="float32"))
model.compile(
    hvd.DistributedOptimizer(tf.keras.optimizers.Adam(0.01)),
    tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
average_metrics = hvd.callbacks.MetricAverageCallback()
average_metrics.backend = tf.keras.backend  # Horovod takes that of Keras 3, where there is one
callbacks = [
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    average_metrics,
    tf.keras.callbacks.ReduceLROnPlateau(patience=2),
    tf.keras.callbacks.EarlyStopping(patience=4),
]
if hvd.rank() == 0:
    folder = sys.argv[1]
    best = tf.keras.callbacks.ModelCheckpoint(f"{folder}/best.keras", save_best_only=True)
    callbacks += [best, tf.keras.callbacks.TensorBoard(f"{folder}/logs")]
verbose = 2 if hvd.rank() == 0 else 0
model.fit(
    training,
    validation_data=validation,
    epochs=4,
    shuffle=False,  # the dataset does
    callbacks=callbacks,
    verbose=verbose,
)
