"""What a session of TensorFlow 1 needs around the layers: the variables that are worth saving."""

from __future__ import annotations

import tensorflow as tf


def prediction_variables(graph: tf.Graph | None = None) -> list[tf.Variable]:
    """Returns the variables that a trained model predicts with, for `tf.compat.v1.train.Saver`.

    After ``saver = Saver(prediction_variables())`` and ``saver.save(session, "model")``, for
    prediction, in another graph with the same layers called with ``training=False``:
    ``Saver(prediction_variables()).restore(session, "model")``.

    These are the trainable variables, and the moving statistics: non-trainable variables that are
    synchronized ``ON_READ`` with aggregation ``MEAN``, as are those of these layers, and those of
    tf_keras' `BatchNormalization`. Other non-trainable variables (an optimizer's slots, a step
    counter, the state of metrics) are not included.

    Args:
        graph: The graph with the model; the default graph where it is ``None``.

    Returns:
        Each variable once, in the order in which they were created.

    Example:
        >>> with tf.Graph().as_default():
        ...     weight = tf.compat.v1.get_variable("weight", [2])
        ...     saver = tf.compat.v1.train.Saver(syncbn.training.prediction_variables())
    """
    if graph is None:
        graph = tf.compat.v1.get_default_graph()
    variables = graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES)
    return [variable for variable in variables if variable.trainable or _is_statistic(variable)]


def _is_statistic(variable: tf.Variable) -> bool:
    return (
        variable.synchronization == tf.VariableSynchronization.ON_READ
        and variable.aggregation == tf.VariableAggregation.MEAN
    )
