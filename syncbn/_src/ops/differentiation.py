"""Custom gradients: exact to any order, in reverse and forward mode, and light on memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

# There is no public API to ask whether a tensor has a tangent. Tried with TensorFlow 2.21;
# tests/single/test_accuracy.py covers it.
from tensorflow.python.eager import forwardprop_util

from syncbn._src.ops.graphs import copied_branches, traced_outside
from syncbn._src.ops.vectorization import convert_loops_with


def in_current_graph(tensor: tf.Tensor) -> tf.Tensor:
    """Returns ``tensor``, or a copy of it in the graph that is being built.

    Inside a branch of a branch or loop, TensorFlow fails to differentiate a custom gradient whose
    input is captured from an outer graph.
    """
    graph = tf.compat.v1.get_default_graph()
    own = tf.executing_eagerly() or getattr(tensor, "graph", None) is graph
    return tensor if own else tf.identity(tensor)


def kept(structure: Any) -> Any:
    """Returns tensors that a gradient keeps from its forward pass, in the graph differentiated.

    In forward mode that graph is a copy where the forward pass is in a branch, and TensorFlow fails
    where a custom gradient uses tensors of the branch itself. Names are the same in both.

    Args:
        structure: Nested. Anything but the tensors of a copied branch is returned unchanged.
    """
    copies = {copy.name.removesuffix("_rewritten"): copy for copy in copied_branches()}

    def of_copy(value: Any) -> Any:
        name = getattr(getattr(value, "graph", None), "name", None)
        if name not in copies:
            return value
        return of_shape(copies[name].get_tensor_by_name(value.name), value.shape)

    return tf.nest.map_structure(of_copy, structure) if copies else structure


def of_shape(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Returns ``tensor`` with the static ``shape``, which the copy of a graph may have lost."""
    if tf.executing_eagerly():
        return tensor
    tensor = tf.convert_to_tensor(tensor)
    tensor.set_shape(shape)
    return tensor


def has_tangent(*tensors: tf.Tensor) -> bool:
    """Says whether a `tf.autodiff.ForwardAccumulator` watches one of ``tensors`` here."""
    return bool(forwardprop_util.pack_tangents(list(tensors)).tangents)


def with_recomputed_gradient(
    axes: Sequence[int], plain: Callable[..., Any], kernel: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Returns an operation that runs ``kernel``, or ``plain``, and differentiates ``plain``.

    The sizes of the ``axes`` of their inputs, and of channel vectors, must be static.

    TensorFlow's own gradients of the fused kernels leave out the contributions of moments and
    means, which only second derivatives need. And an eager tape would keep every intermediate
    tensor for them; instead, ``plain`` is recomputed when a gradient is taken.

    Create it once, not in each call: it caches the functions that eager gradients run.
    """

    def vector_jacobian_product(
        inputs: Sequence[tf.Tensor], upstream: Sequence[tf.Tensor]
    ) -> list[tf.Tensor | None]:
        # Not with a tape: in a backward function called by forward-mode differentiation (which
        # transposes it), tapes record nothing.
        inputs = [tf.identity(one) for one in inputs]
        pairs = zip(tf.nest.flatten(plain(*inputs)), upstream, strict=True)
        outputs, upstream = zip(*(pair for pair in pairs if pair[0].dtype.is_floating), strict=True)
        return tf.gradients(outputs, inputs, upstream)

    @functools.cache
    def eager_product(*shapes: tuple[int | None, ...]) -> Callable[..., Any]:
        # One function for all shapes would be traced with an unknown number of channels.
        return tf.function(vector_jacobian_product, autograph=False, reduce_retracing=True)

    @tf.custom_gradient
    def call(*inputs: tf.Tensor) -> tuple[Any, Callable]:
        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor | None]:
            if not tf.executing_eagerly():
                return vector_jacobian_product(kept(inputs), upstream)
            with _running_functions():
                return eager_product(*(_known(one, axes) for one in inputs))(inputs, upstream)

        # Gradients stopped: eager tapes record the custom gradient and also the operations inside
        # it. And TensorFlow cannot differentiate a branch of `tf.cond` in which compiled code
        # captures its inputs from outside; these copies are inside.
        return (kernel or plain)(*map(tf.stop_gradient, inputs)), gradient

    def operation(*inputs: tf.Tensor) -> Any:
        # In a graph, forward mode differentiates the operations inside a custom gradient.
        if not tf.executing_eagerly() and (kernel is None or has_tangent(*inputs)):
            return plain(*inputs)
        outputs = call(*map(in_current_graph, inputs))
        if not tf.executing_eagerly():
            _vectorize_as(plain, len(inputs), outputs)
        return outputs

    return operation


def _vectorize_as(plain: Callable[..., Any], number: int, outputs: Any) -> None:
    """Makes a vectorized loop run ``plain`` in place of an operation with a custom gradient.

    `tf.vectorized_map`, and a jacobian that is itself differentiated, convert operations one by one
    and drop custom gradients: the gradient would go into the kernel, and end there.

    Args:
        plain: The function to differentiate.
        number: The number of its inputs.
        outputs: The outputs of the operation, in a graph.
    """

    def convert(loop: Any) -> list[Any]:
        # Its inputs begin with the results, which are not needed here.
        inputs = loop.inputs[-number:]
        rows = {at: one.t for at, one in enumerate(inputs) if one.is_stacked}

        def iteration(row: dict[int, tf.Tensor]) -> list[tf.Tensor]:
            return tf.nest.flatten(plain(*(row.get(at, one.t) for at, one in enumerate(inputs))))

        results = tf.vectorized_map(iteration, rows) if rows else iteration({})
        return [inputs[0]._replace(t=one, is_stacked=bool(rows)) for one in results] + inputs

    convert_loops_with(tf.nest.flatten(outputs)[0].op, convert)


def compiled(function: Callable[..., Any], axes: Sequence[int]) -> Callable[..., Any]:
    """Returns ``function`` as an operation that XLA compiles, and `with_recomputed_gradient`.

    It is traced once for each dtype and number of channels, whatever the other sizes are, and XLA
    compiles it once for each shape that occurs. Create it once, not in each call.
    """

    @functools.cache
    def traced(*specs: tf.TensorSpec) -> Callable[..., Any]:
        return traced_outside(function, *specs, jit_compile=True)

    def kernel(*inputs: tf.Tensor) -> Any:
        return traced(*(tf.TensorSpec(_known(one, axes), one.dtype) for one in inputs))(*inputs)

    return with_recomputed_gradient(axes, function, kernel)


def _known(tensor: tf.Tensor, axes: Sequence[int]) -> tuple[int | None, ...]:
    """Returns the shape, with ``None`` for sizes that may change from batch to batch."""
    shape = tensor.shape.as_list()
    if len(shape) < 2:
        return tuple(shape)
    return tuple(size if axis in axes else None for axis, size in enumerate(shape))


@contextlib.contextmanager
def _running_functions() -> Iterator[None]:
    """Runs a `tf.function` as a graph, even under `tf.config.run_functions_eagerly(True)`."""
    before = tf.config.functions_run_eagerly()
    if before:
        tf.config.run_functions_eagerly(False)
    try:
        yield
    finally:
        if before:
            tf.config.run_functions_eagerly(True)
