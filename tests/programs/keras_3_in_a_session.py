"""Keras 3 has no place for updates that a session should run, so a training call is refused."""

import pytest
import tensorflow as tf

import syncbn

with tf.Graph().as_default():
    x = tf.ones([2, 3])
    with pytest.raises(NotImplementedError, match="TF_USE_LEGACY_KERAS=1"):
        syncbn.SyncCentering()(x, training=True)
