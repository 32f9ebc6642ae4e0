"""MultiWorkerMirroredStrategy with tf_keras, one process for each worker.

TF_USE_LEGACY_KERAS=1 syncbn launch multiworker --workers 2 -- python multiworker_before.py FOLDER
"""

import sys
import tempfile

import tensorflow as tf
from images import load_images

rank = tf.distribute.cluster_resolver.TFConfigClusterResolver().task_id
gpus = tf.config.list_physical_devices("GPU")
if gpus:  # all workers are on one machine
    tf.config.set_visible_devices(gpus[rank % len(gpus)], "GPU")
strategy = tf.distribute.MultiWorkerMirroredStrategy()
tf.keras.mixed_precision.set_global_policy("mixed_float16" if gpus else "mixed_bfloat16")
tf.keras.utils.set_random_seed(0)

# Each worker reads every n-th sample, in batches of its part of this size.
batch = 8 * strategy.num_replicas_in_sync
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
training, validation = (
    tf.data.Dataset.from_tensor_slices(part).with_options(options) for part in load_images()
)
training = training.shuffle(384, seed=0).batch(batch, drop_remainder=True).prefetch(2)
validation = validation.batch(batch, drop_remainder=True).prefetch(2)

layers = tf.keras.layers
with strategy.scope():
    model = tf.keras.Sequential([tf.keras.Input((8, 8, 1))])
    for filters in 8, 16:
        model.add(layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9, synchronized=True))
        model.add(layers.ReLU())
    model.add(layers.Flatten())
    model.add(layers.Dense(3, dtype="float32"))
    model.compile(
        tf.keras.optimizers.Adam(0.01),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
# Saving is collective: all workers save, and rank 0 to where it counts.
folder = sys.argv[1] if rank == 0 else tempfile.mkdtemp()
callbacks = [
    tf.keras.callbacks.ReduceLROnPlateau(patience=2),
    tf.keras.callbacks.EarlyStopping(patience=4),
    tf.keras.callbacks.ModelCheckpoint(f"{folder}/best.keras", save_best_only=True),
]
if rank == 0:
    callbacks.append(tf.keras.callbacks.TensorBoard(f"{folder}/logs"))
verbose = 2 if rank == 0 else 0
model.fit(
    training,
    validation_data=validation,
    epochs=4,
    shuffle=False,  # the dataset does
    callbacks=callbacks,
    verbose=verbose,
)
