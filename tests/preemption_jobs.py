"""A small model and its data, for jobs that end and go on."""

import numpy as np

import syncbn
from tests.keras import keras


def compiled(optimizer, units=4, **options):
    layers = [keras.layers.Dense(units), syncbn.SyncBatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer, "mse", jit_compile=False, **options)
    return model


def samples(count=32):
    rng = np.random.default_rng(1)
    x, y = rng.normal(2, 3, (count, 3)), rng.normal(size=(count, 1))
    return x.astype("float32"), y.astype("float32")


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(*samples(), epochs=epochs, callbacks=list(callbacks), **options).history


class Fails(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.step:
            raise RuntimeError("a callback failed")
