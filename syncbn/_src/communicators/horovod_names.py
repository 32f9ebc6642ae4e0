"""Names for the operations of Horovod that run eagerly.

Horovod matches the processes' calls by the names of the operations. Eagerly TensorFlow keeps a name
to itself, so that calls of different layers would be taken for the same one wherever processes make
them in different orders: a wrong sum, without an error. An operation of a graph has a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


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
            name: The name.
        """
        # A tape would have the graph's gradient made, too.
        tensors = tf.nest.map_structure(tf.stop_gradient, tensors)
        specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, tensors)
        key = (name, *tf.nest.flatten(specs))
        if key not in self._graphs:
            # A concrete function is a graph also under `tf.config.run_functions_eagerly`.
            function = tf.function(operation, autograph=False)
            self._graphs[key] = function.get_concrete_function(specs)
        return self._graphs[key](tensors)
