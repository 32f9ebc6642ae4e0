"""The momentum of a moving average: a number, or a variable."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.untrained_traces import never_trains
from syncbn._src.ops.graphs import in_session


class Momentum:
    """The share of a moving average that is kept at each batch.

    A variable is read at each training call, so that assigning to it makes a schedule. It does not
    become a weight of the layer, since Keras does not see it in here.

    Args:
        name: The argument's name.
        given: A number or a scalar variable in [0, 1].
        or_none: What ``None`` stands for, where it is allowed.

    Raises:
        ValueError: a value outside of [0, 1].
        TypeError: neither a number nor a scalar variable of floats; a variable in the graph of a
            session.
    """

    def __init__(self, name: str, given: Any, or_none: str = "") -> None:
        self._name = name
        self._variable: tf.Variable | None = None
        self._number: Any = None
        if isinstance(given, keras_api.VARIABLES):
            self._variable = self._checked_variable(given)
            self._dtype = self._variable.dtype
        elif _is_number(given):
            self._number = float(given)
        elif given is not None:
            raise TypeError(self._must_be(given))
        value = self.value()
        if not (or_none if value is None else 0.0 <= value <= 1.0):  # nor NaN
            or_none = or_none and f", or be None for {or_none}"
            raise ValueError(f"`{name}` must lie in [0, 1]{or_none}. Received: {name}={value}.")

    @property
    def given(self) -> Any:
        """The number, the TensorFlow variable, or ``None``."""
        return self._number if self._variable is None else self._variable

    def value(self) -> Any:
        """Returns the current value, a float, or ``None``."""
        if self._variable is None:
            return self._number
        with tf.init_scope():
            return float(self._variable.numpy())

    def rate(self) -> tf.Tensor:
        """Returns how far the average moves towards a batch, a float64 scalar.

        Raises:
            tf.errors.InvalidArgumentError: the variable is outside of [0, 1] when the graph runs.
                XLA removes such checks; the average becomes NaN there.
        """
        if self._variable is None or never_trains():
            return tf.constant(1.0 - self.value(), tf.float64)
        momentum = tf.convert_to_tensor(self._variable)
        if momentum.dtype != self._dtype:  # autocast: another value
            raise TypeError(self._must_be(self._variable))
        momentum = tf.cast(momentum, tf.float64)
        # A graph cannot raise in Python. Clipping would silently train with another momentum. The
        # NaN is a root, since a constant would alarm `tf.debugging.enable_check_numerics`.
        inside = (momentum >= 0.0) & (momentum <= 1.0)
        message = f"`{self._name}` must lie in [0, 1]. Received:"
        check = tf.raw_ops.Assert(condition=inside, data=[message, momentum])
        with tf.control_dependencies([check]):
            return 1.0 - momentum + tf.sqrt(tf.cast(inside, tf.float64) - 1.0)

    def _checked_variable(self, given: Any) -> tf.Variable:
        variable = keras_api.variable(given) if not isinstance(given, tf.Variable) else given
        scalar = isinstance(variable, tf.Variable) and variable.shape.rank == 0
        if in_session() or not (scalar and variable.dtype.is_floating):
            raise TypeError(self._must_be(given))
        return variable

    def _must_be(self, given: Any) -> str:
        return (
            f"`{self._name}` must be a number, or, outside of sessions, a scalar variable of "
            f"floats that Keras does not autocast. Received: {self._name}={given!r}. Use "
            "tf.Variable(0.99, trainable=False)."
        )


class MomentumAttribute:
    """An attribute of a layer that holds a momentum, and reads as what was given."""

    def __init__(self, or_none: str = "") -> None:
        self._or_none = or_none

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        return self if layer is None else momentum_of(layer, self._name).given

    def __set__(self, layer: Any, given: Any) -> None:
        # A `Momentum` comes from another layer, which this one is being turned into.
        made = isinstance(given, Momentum)
        vars(layer)[self._name] = given if made else Momentum(self._name, given, self._or_none)


def momentum_of(layer: Any, name: str) -> Momentum:
    """Returns the momentum that a layer holds as attribute ``name``."""
    if name not in vars(layer):
        raise AttributeError(f"{type(layer).__name__} has no {name} yet.")
    return vars(layer)[name]


def _is_number(given: Any) -> bool:
    if tf.is_tensor(given) and not hasattr(given, "numpy"):
        return False  # of a graph: it has no value yet
    return np.ndim(given) == 0 and np.asarray(given).dtype.kind in "buif"
