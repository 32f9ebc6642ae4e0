"""Which Keras the tests run with; both are run."""

import tensorflow as tf

keras = tf.keras
KERAS_3 = hasattr(keras, "Variable")
