"""Names for the operations of Horovod that run eagerly.

Horovod matches the processes' calls by the names of the operations. Eagerly TensorFlow keeps a name
to itself, so that calls of different layers would be taken for the same one wherever processes make
them in different orders: a wrong sum, without an error. An operation of a graph has a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

MOST = 4000
"""How many graphs are kept. A name takes 0.1 MB, and each new model may bring new ones."""


def operation_name(name: str) -> str:
    """Returns ``name`` without what TensorFlow takes in no operation's name."""
    name = re.sub(r"[^\w.\\/>-]", "_", name, flags=re.ASCII)
    return name if re.match("[A-Za-z0-9.]", name) else f"n{name}"


class EagerCalls:
    """Makes calls by their names, each in a graph of its own, which is kept."""

    def __init__(self) -> None:
        self._graphs: dict[tuple, Callable] = {}

    def __call__(self, operation: Callable[[Any], Any], tensors: Any, name: str) -> Any:
        """Returns ``operation(tensors)``, not differentiable.

        Args:
            operation: Gives its operation of Horovod ``name``; it is the same in all calls with
                this name.
            tensors: A tensor, or a list of some.
            name: The name, as of `operation_name`.
        """
        # A tape would have the graph's gradient made, too.
        tensors = tf.nest.map_structure(tf.stop_gradient, tensors)
        # Of any shape, so that other ones need no graph of their own.
        specs = tf.nest.map_structure(
            lambda one: tf.TensorSpec([None] * one.shape.rank, one.dtype), tensors
        )
        key = (name, isinstance(tensors, list), *tf.nest.flatten(specs))
        if key not in self._graphs:
            if len(self._graphs) >= MOST:
                del self._graphs[next(iter(self._graphs))]
            # A concrete function is a graph also under `tf.config.run_functions_eagerly`.
            function = tf.function(operation, autograph=False)
            self._graphs[key] = function.get_concrete_function(specs)
        return self._graphs[key](tensors)
