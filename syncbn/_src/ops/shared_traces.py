"""Functions that are traced once for all layers of a model with the same shapes and dtypes.

A model has dozens of normalization layers of a few shapes, on several replicas. What they have in
common is one function: it is traced once, and the graph has one node for each call. On a GPU it is
one kernel, or a few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn._src.ops import xla
from syncbn._src.ops.differentiation import has_tangent
from syncbn._src.ops.graphs import in_session, traced_outside

# For each function; the least recently used are dropped.
_MOST_TRACES = 256

# Before a graph runs for the first time, TensorFlow inlines functions, and optimizes as many
# copies. Functions of this many elements, or of an unknown number, are called instead: a call takes
# some 20 µs, but they also have more operations.
_CALLED_FROM_ELEMENTS = 1 << 16


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function``, traced once for inputs of the same shapes and dtypes.

    Create it once, not in each call: it caches the traces.

    Args:
        function: From tensors to tensors in any structure. It must depend neither on anything else
            that changes, nor on where it is called.
    """

    @functools.lru_cache(_MOST_TRACES)
    def trace(by_xla: bool, *specs: tf.TensorSpec) -> Callable[..., Any]:
        few = all(
            one.shape.is_fully_defined() and one.shape.num_elements() < _CALLED_FROM_ELEMENTS
            for one in specs
        )
        return traced_outside(
            function,
            *specs,
            jit_compile=by_xla or None,
            experimental_attributes=None if by_xla or few else {"_noinline": True},
        )

    @functools.wraps(function)
    def call(*inputs: tf.Tensor) -> Any:
        if not _in_place() or has_tangent(*inputs):
            return function(*inputs)
        specs = (tf.TensorSpec(one.shape, one.dtype) for one in inputs)
        return trace(xla.on_gpus(), *specs)(*inputs)

    return call


def _in_place() -> bool:
    """Says whether function calls are worthwhile here."""
    # Where XLA compiles a function as a whole, it inlines the calls; the graphs of sessions should
    # not contain functions.
    return not (in_session() or tf.executing_eagerly() or xla.compiles_everything())
