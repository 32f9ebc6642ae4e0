"""`syncbn` over Horovod, with Keras 3 or tf_keras.

horovodrun --gloo -np 2 python horovod_after.py FOLDER
"""

import sys

import horovod.tensorflow as hvd
import tensorflow as tf
from images import load_images

import syncbn
from syncbn.training import AverageMetrics, BroadcastVariables, distribute, init_horovod, join

init_horovod()
gpus = tf.config.list_physical_devices("GPU")
if gpus:  # a GPU for each rank
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
tf.keras.mixed_precision.set_global_policy("mixed_float16" if gpus else "mixed_bfloat16")

training, validation = (
    tf.data.Dataset.from_tensor_slices(part).shard(hvd.size(), hvd.rank()) for part in load_images()
)
# Ranks may have different numbers of samples, and all of them count.
training = join(training.shuffle(384, seed=0).batch(8), sample_weight=True)
validation = join(validation.batch(8), sample_weight=True)

layers = tf.keras.layers
model = tf.keras.Sequential([tf.keras.Input((8, 8, 1))])
for filters in 8, 16:
    model.add(layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
    model.add(syncbn.SyncBatchNormalization(momentum=0.9))
    model.add(layers.ReLU())
model.add(layers.Flatten())
model.add(layers.Dense(3, dtype="float32"))
optimizer = tf.keras.optimizers.Adam(0.01)
if gpus:  # the optimizer that scales the loss is the one to distribute
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(optimizer)
model.compile(
    distribute(optimizer),
    tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=["accuracy"],
)
callbacks = [
    BroadcastVariables(),
    AverageMetrics(),
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
