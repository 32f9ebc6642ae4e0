"""Which Keras the tests run with; both are run."""

import inspect

import pytest
import tensorflow as tf

keras = tf.keras
KERAS_3 = hasattr(keras, "Variable")

with_renormalization = pytest.mark.skipif(
    KERAS_3 and "renorm" not in inspect.signature(keras.layers.BatchNormalization).parameters,
    reason="Keras 3 has renormalization since 3.14",
)
