"""What was written for TensorBoard."""

import tensorflow as tf


def summaries(path):
    """The scalars of a file of events, by their steps and tags.

    TensorBoard shows those of 32 bits only.
    """
    found = {}
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            assert value.tensor.dtype == tf.float32.as_datatype_enum
            found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    return found
