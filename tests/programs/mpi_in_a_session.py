"""MPI refuses to train in a session of TensorFlow 1; inference is no matter."""

import pytest
import tensorflow as tf

tf.compat.v1.disable_eager_execution()

from mpi4py import MPI  # noqa: E402, F401  (which initializes it)

import syncbn  # noqa: E402

with pytest.raises(NotImplementedError, match="Use Horovod"):
    syncbn.SyncCentering()(tf.ones([2, 3]), training=True)
assert syncbn.SyncCentering()(tf.ones([2, 3]), training=False).shape == (2, 3)
