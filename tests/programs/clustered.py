"""Statistics and outputs under automatic clustering, at large means."""

import numpy as np
import tensorflow as tf

import syncbn

for mean, tolerance in ((60.0, 2e-6), (1e6, 2e-3)):
    x = np.random.default_rng(0).normal(mean, 1, size=(4096, 64)).astype("float32")
    layer = syncbn.SyncBatchNormalization(momentum=0.0)
    y = tf.function(lambda x, layer=layer: tf.nn.relu(layer(tf.nn.relu(x), training=True)))(x)
    truth = x.astype("float64")
    np.testing.assert_allclose(layer.moving_variance, truth.var(0), rtol=tolerance)
    truth = np.maximum((truth - truth.mean(0)) / np.sqrt(truth.var(0) + 1e-3), 0)
    np.testing.assert_allclose(y, truth, atol=1e-3)
