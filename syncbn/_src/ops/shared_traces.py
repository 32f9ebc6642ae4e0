"""Functions that are traced once for all layers of a model that call them alike.

A model has dozens of normalizations and a few shapes of them, on several replicas. What is the same
in all of them is one function, called in as many places: it is traced once, and the graph has one
node for each call. On a GPU it is one kernel, or few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.differentiation import has_tangent

# Of each function, for the shapes and dtypes that were called last.
_MOST_TRACES = 256

# Before a graph runs for the first time, TensorFlow puts functions in the place of their calls, and
# optimizes as many copies. Those of so many elements, or of unknown ones, are called instead: it
# takes some 20 µs, but they also are of more operations.
_CALLED_FROM_ELEMENTS = 1 << 16


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function``, of which a graph holds one trace for inputs of like shapes and dtypes.

    Make it once, not in each call: it keeps the traces.

    Args:
        function: Of tensors, to tensors in any structure. Whatever else it depends on never
            changes, nor does it matter where it is called.
    """

    @functools.lru_cache(_MOST_TRACES)
    def trace(by_xla: bool, *specs: tf.TensorSpec) -> Callable[..., Any]:
        few = all(
            one.shape.is_fully_defined() and one.shape.num_elements() < _CALLED_FROM_ELEMENTS
            for one in specs
        )
        # Outside of the graph, replica and device that are the first to call it.
        traced = tf.function(
            function,
            autograph=False,
            jit_compile=by_xla or None,
            experimental_attributes=None if by_xla or few else {"_noinline": True},
        )
        with tf.init_scope(), tf.device(None):
            return traced.get_concrete_function(*specs)

    @functools.wraps(function)
    def call(*inputs: tf.Tensor) -> Any:
        if not _in_place() or has_tangent(*inputs):
            return function(*inputs)
        specs = (tf.TensorSpec(one.shape, one.dtype) for one in inputs)
        return trace(xla.on_gpus(), *specs)(*inputs)

    return call


def _in_place() -> bool:
    """Says whether calls of functions are worth their while here."""
    # XLA makes one of all that it compiles as a whole; graphs of sessions are no place for
    # functions.
    in_function = tf.compat.v1.executing_eagerly_outside_functions()
    return in_function and not tf.executing_eagerly() and not xla.compiles_everything()
