"""Where XLA compiles operations, and so may compute them another way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

# There is no public API for this while a function is traced; after the trace XLA's own message
# names neither the layer nor the remedy. Tried with TensorFlow 2.16 and 2.21;
# tests/single/test_jit.py covers it.
from tensorflow.python.ops import control_flow_util


def on_gpus() -> bool:
    """Says whether TensorFlow sees GPUs, for which XLA compiles the plain operations."""
    return bool(tf.config.get_visible_devices("GPU"))


def compiles_everything() -> bool:
    """Says whether a function that XLA compiles as a whole is being traced."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@contextlib.contextmanager
def kept_out_of(example: tf.Tensor) -> Iterator[None]:
    """Keeps XLA from operations whose results depend on how their kernel computes.

    Automatic clustering leaves them out. A function that was traced with them fails to compile when
    it is called inside a function that XLA compiles as a whole.

    Args:
        example: Any tensor that the operations take, except of strings.
    """
    if tf.executing_eagerly():
        yield
        return
    # XLA does not support strings.
    barrier = tf.strings.as_string(tf.size(example), name="not_for_xla_trace_in_compiled_function")
    with tf.xla.experimental.jit_scope(compile_ops=False), tf.control_dependencies([barrier]):
        yield
