"""Where XLA compiles operations, which then compute another way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

# XLA's reduction of several tensors in one pass. TensorFlow's public sums of two tensors are two
# kernels on a GPU, each of which reads all of them. Tried with TensorFlow 2.21.
from tensorflow.compiler.tf2xla.python import xla as tf2xla

# There is no public way to learn this while a function is traced; after the trace XLA's own
# message names neither the layer nor the remedy. Tried with TensorFlow 2.16 and 2.21;
# tests/single/test_jit.py holds it.
from tensorflow.python.ops import control_flow_util

from syncbn.ops.differentiation import has_tangent


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


def rounded_to_float32(wide: tf.Tensor) -> tf.Tensor:
    """Returns float64 numbers rounded as float32 has them, and float64 still.

    Only in what XLA compiles: it takes a cast there and back for nothing, and leaves it out.
    """

    @tf.custom_gradient
    def rounded(wide: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return tf2xla.reduce_precision(wide, exponent_bits=8, mantissa_bits=23), lambda dy: dy

    return rounded(wide)


_TOGETHER = "variadic"


def sum_together(parts: Sequence[tf.Tensor], dimensions: Sequence[int]) -> list[tf.Tensor]:
    """Returns the sum of each of ``parts``, of like shapes, over ``dimensions``: in one pass.

    Only in what XLA compiles.
    """
    if _TOGETHER == "complex" and len(parts) == 2:
        total = tf.reduce_sum(tf.complex(*parts), list(dimensions))
        return [tf.math.real(total), tf.math.imag(total)]
    if _TOGETHER == "apart" or has_tangent(
        *parts
    ):  # forward mode goes through a gradient's insides
        return [tf.reduce_sum(part, list(dimensions)) for part in parts]
    shape, rank = tf.shape(parts[0]), parts[0].shape.rank

    @tf.custom_gradient
    def sums(*parts: tf.Tensor) -> tuple[list[tf.Tensor], Callable]:
        zeros = [tf.zeros([], part.dtype) for part in parts]
        totals = tf2xla.variadic_reduce(
            list(parts), zeros, list(dimensions), _adding_up(parts[0].dtype, len(parts))
        )

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            kept = [1 if d in dimensions else parts[0].shape[d] for d in range(rank)]
            return [tf.broadcast_to(tf.reshape(one, kept), shape) for one in upstream]

        return totals, gradient

    return sums(*parts)


@functools.cache
def _adding_up(dtype: tf.DType, number: int) -> Callable[..., list[tf.Tensor]]:
    def add(*pairs: tf.Tensor) -> list[tf.Tensor]:
        return [pairs[i] + pairs[number + i] for i in range(number)]

    specs = [tf.TensorSpec([], dtype)] * (2 * number)
    with tf.init_scope():
        return tf.function(add, autograph=False).get_concrete_function(*specs)
