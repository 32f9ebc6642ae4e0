"""One process on one device: python mpi_before.py FOLDER."""

import sys

import tensorflow as tf
from images import load_images

gpus = tf.config.list_physical_devices("GPU")
tf.keras.mixed_precision.set_global_policy("mixed_float16" if gpus else "mixed_bfloat16")

training, validation = (tf.data.Dataset.from_tensor_slices(part) for part in load_images())
training = training.shuffle(384, seed=0).batch(16).prefetch(2)
validation = validation.batch(16).prefetch(2)

layers = tf.keras.layers
model = tf.keras.Sequential([tf.keras.Input((8, 8, 1))])
for filters in 8, 16:
    model.add(layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
    model.add(layers.BatchNormalization(momentum=0.9))
    model.add(layers.ReLU())
model.add(layers.Flatten())
model.add(layers.Dense(3, dtype="float32"))
model.compile(
    tf.keras.optimizers.Adam(0.01),
    tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
folder = sys.argv[1]
callbacks = [
    tf.keras.callbacks.ReduceLROnPlateau(patience=2),
    tf.keras.callbacks.EarlyStopping(patience=4),
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
