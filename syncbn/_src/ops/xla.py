"""Where XLA compiles operations, which then compute another way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

# There is no public way to learn this while a function is traced; after the trace XLA's own
# message names neither the layer nor the remedy. Tried with TensorFlow 2.16 and 2.21;
# tests/single/test_jit.py holds it.
from tensorflow.python.ops import control_flow_util


def on_gpus() -> bool:
    """Says whether TensorFlow uses GPUs here, for which XLA makes kernels of what we spell out."""
    return bool(tf.config.get_visible_devices("GPU"))


def compiles_everything() -> bool:
    """Says whether a function that XLA compiles as a whole is being traced."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@contextlib.contextmanager
def kept_out_of(example: tf.Tensor) -> Iterator[None]:
    """Keeps operations as they are: for results that rest on how a kernel computes.

    Automatic clustering leaves them alone. A function that was traced before, and is called in one
    that XLA compiles as a whole, does not compile.

    Args:
        example: Any tensor that the operations take. Not of strings.
    """
    if tf.executing_eagerly():
        yield
        return
    # XLA knows no strings.
    barrier = tf.strings.as_string(tf.size(example), name="not_for_xla_trace_in_compiled_function")
    with tf.xla.experimental.jit_scope(compile_ops=False), tf.control_dependencies([barrier]):
        yield
