"""A model with a `train_step` of its own, and an optimizer for each of its parts."""

import tensorflow as tf

from tests.keras import keras


class TwoOptimizers(keras.Model):
    """Keras' own optimizer, which `compile` makes, trains nothing in it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Dense(3), keras.layers.Dense(1)
        self.build((None, 4))

    def build(self, shape):
        self.first.build(shape)
        self.last.build((None, 3))
        self.built = True

    def compile(self, of_first, of_last, build=True, **options):
        super().compile(jit_compile=False, **options)
        self.of_first, self.others = of_first, [of_last]
        if build:
            of_first.build(self.first.trainable_variables)
            of_last.build(self.last.trainable_variables)

    def call(self, x):
        return self.last(self.first(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            error = tf.reduce_mean((self(x) - y) ** 2)
        of_first, of_last = tape.gradient(
            error, [self.first.trainable_variables, self.last.trainable_variables]
        )
        pairs = zip(of_first, self.first.trainable_variables, strict=True)
        self.of_first.apply_gradients(pairs)
        self.others[0].apply_gradients(zip(of_last, self.last.trainable_variables, strict=True))
        return {"error": error}
