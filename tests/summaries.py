"""What was written for TensorBoard."""

import tensorflow as tf


def summaries(path):
    """The scalars of a file of events, by their steps and tags."""
    found = {}
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    return found
