"""Keras 3's own synchronized layer under MirroredStrategy: python mirrored_before.py FOLDER."""

import sys

import tensorflow as tf
from images import load_images

folder = sys.argv[1]
gpus = tf.config.list_physical_devices("GPU")
if not gpus:  # to try it: two CPU devices
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(None if gpus else ["CPU:0", "CPU:1"])
tf.keras.mixed_precision.set_global_policy("mixed_float16" if gpus else "mixed_bfloat16")

# A batch is split over the replicas of the process.
batch = 8 * strategy.num_replicas_in_sync
training, validation = (tf.data.Dataset.from_tensor_slices(part) for part in load_images())
training = training.shuffle(384, seed=0).batch(batch, drop_remainder=True).prefetch(2)
validation = validation.batch(batch).prefetch(2)

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
callbacks = [
    tf.keras.callbacks.ReduceLROnPlateau(patience=2),
    tf.keras.callbacks.EarlyStopping(patience=4, restore_best_weights=True),
    tf.keras.callbacks.ModelCheckpoint(f"{folder}/best.keras", save_best_only=True),
    tf.keras.callbacks.TensorBoard(f"{folder}/logs"),
]
model.fit(
    training,
    validation_data=validation,
    epochs=4,
    shuffle=False,  # the dataset does
    callbacks=callbacks,
    verbose=2,
)
