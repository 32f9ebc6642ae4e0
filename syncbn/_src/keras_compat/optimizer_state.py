"""The state of the optimizers of Keras 2 and 3."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from syncbn._src.autograph import unconverted
from syncbn._src.keras_compat.keras_api import KERAS_3, keras, variable

_INDICES = "_trainable_variables_indices" if KERAS_3 else "_index_dict"
"""The attribute of a built optimizer that has the index of each variable."""

_LEGACY_WITH_VELOCITIES: tuple[type, ...] = ()
if not KERAS_3:
    _LEGACY_WITH_VELOCITIES = (keras.optimizers.legacy.SGD, keras.optimizers.legacy.RMSprop)


def inner_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer that a loss-scaling one wraps, or ``None``."""
    return getattr(optimizer, "inner_optimizer", None)


def innermost(optimizer: Any) -> Any:
    """Returns the optimizer that loss-scaling ones wrap, or that optimizer itself."""
    while (inner := inner_optimizer(optimizer)) is not None:
        optimizer = inner
    return optimizer


def trained_variables(optimizer: Any, given: Any) -> list[Any]:
    """Returns the variables of a call ``optimizer.apply(gradients, given)`` of Keras 3."""
    return list(optimizer._trainable_variables if given is None else given)


def build_optimizer(optimizer: Any, variables: Sequence[Any]) -> None:
    """Makes an optimizer create its state now, if it would do so in its first step."""
    if KERAS_3 and not getattr(optimizer, "built", True):
        with tf.init_scope():
            optimizer.build(variables)
            optimizer.built = True


def has_state(optimizer: Any) -> bool:
    """Says whether an optimizer of `tf.keras` has created all of its state.

    Of Keras 2's ``legacy`` ones that is not known, which create it bit by bit.
    """
    if KERAS_3:
        return getattr(optimizer, "built", False)
    return bool(getattr(innermost(optimizer), _INDICES, None))


def finds_state_by_variable(optimizer: Any) -> bool:
    """Says whether an optimizer may create state for more variables than it trains.

    Those of Keras 2's ``legacy`` find it by the variable, others by its place in a list.
    """
    return hasattr(innermost(optimizer), "get_slot")


def create_optimizer_state(optimizer: Any, variables: Sequence[Any]) -> None:
    """Makes an optimizer of `tf.keras` create its state now, unless it has.

    Keras 2 has no public way to do that for its ``legacy`` optimizers. Tried with tf_keras 2.21.
    """
    build_optimizer(optimizer, variables)
    if KERAS_3:
        return
    with tf.init_scope():
        if isinstance(optimizer, keras.optimizers.legacy.Optimizer):
            optimizer._create_all_weights(variables)
        else:
            optimizer.build(variables)


def optimizer_variables(optimizer: Any) -> list[Any]:
    """Returns the state of an optimizer, as far as it has been created.

    In Keras 2, `variables` lacks what TensorFlow finds: the learning rate, the loss scale, and
    Nadam's product, for three.
    """
    found = _counted_variables(optimizer)
    if not KERAS_3:
        known = {id(one) for one in found}
        found += [
            one
            for one in tf.train.TrackableView(optimizer).descendants()
            if isinstance(one, tf.Variable) and id(one) not in known
        ]
    return found


def _counted_variables(optimizer: Any) -> list[Any]:
    variables = optimizer.variables
    return list(variables() if callable(variables) else variables)


def optimizer_kind(optimizer: Any) -> dict[str, list[str]]:
    """Returns what tells optimizers apart whose state has been created: classes, and shapes of it.

    The class of a distributed optimizer is that of the optimizer itself. Variables have no names
    here: those have numbers in them, which depend on what else the process has made.
    """
    nested = [optimizer, inner_optimizer(optimizer)]
    return {
        "classes": [type(one).__name__ for one in nested if one is not None],
        "shapes": [str(tuple(one.shape)) for one in _counted_variables(optimizer)],
    }


def serialized_class(cls: Any) -> dict[str, Any]:
    """Returns what `keras.optimizers.serialize` says of an optimizer but for its config.

    Made of an instance without any state: one from a config would need the user's custom objects.
    """
    bare = cls.__new__(cls)
    vars(bare)["get_config"] = dict
    serialized = keras.optimizers.serialize(bare)
    del serialized["config"]
    return serialized


def current_rate(optimizer: Any) -> float:
    """Returns the learning rate of the next step, or zero where an optimizer has none."""
    rate = getattr(optimizer, "learning_rate", 0.0)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(optimizer.iterations)
    return float(tf.convert_to_tensor(variable(rate)))


def state_of(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Returns an optimizer's state for each of ``variables``, such as its momentum.

    There is no public API for this, except the slots of older optimizers. The others, of Keras 2
    and 3, keep lists parallel to that of the variables that they were built with.

    Raises:
        ValueError: the optimizer keeps anything but scalars outside of such lists.
    """
    optimizer = innermost(optimizer)
    if finds_state_by_variable(optimizer):
        return _slots(optimizer, variables, optimizer.get_slot_names())
    indices = getattr(optimizer, _INDICES, {})
    own = [indices[key] for key in map(optimizer._var_key, variables) if key in indices]
    state = _counted_variables(optimizer)
    known = {id(one) for one in state}
    lists = [
        value
        for name, value in vars(optimizer).items()
        if name not in ("_variables", "_trainable_variables")
        and isinstance(value, list | tuple)
        and len(value) == len(indices)
        and any(id(one) in known for one in value)
    ]
    found = {id(one) for value in lists for one in value}
    for one in state:
        if len(one.shape) and id(one) not in found:
            raise ValueError(
                "Where variables are local, it must be known which of an optimizer's state belongs "
                f"to them. Received: {type(optimizer).__name__}, for whose {one.name} it is not "
                "known. Use another optimizer, such as SGD or Adam."
            )
    return [value[index] for value in lists for index in own if value[index] is not None]


def _slots(optimizer: Any, variables: Sequence[Any], names: Sequence[str]) -> list[Any]:
    found = []
    for one, name in itertools.product(variables, names):
        with contextlib.suppress(KeyError):  # there are none before the first step
            found.append(optimizer.get_slot(one, name))
    return [slot for slot in found if slot is not None]


def velocities(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Returns the state of an optimizer that is a sum of past steps, learning rates included.

    SGD and RMSprop with momentum have such state; that of others is made of gradients.

    Args:
        optimizer: An optimizer of `tf.keras`.
        variables: The variables that it trains.
    """
    optimizer = innermost(optimizer)
    if finds_state_by_variable(optimizer):
        with_velocities = isinstance(optimizer, _LEGACY_WITH_VELOCITIES)
        return _slots(optimizer, variables, ["momentum"]) if with_velocities else []
    if isinstance(optimizer, keras.optimizers.SGD):
        return list(getattr(optimizer, "momentums", ()))
    if isinstance(optimizer, keras.optimizers.RMSprop):
        return list(getattr(optimizer, "_momentums", ()))
    return []


def leave_gradients(optimizer: Any) -> None:
    """Makes an optimizer assign gradients to weights where it would apply them.

    Everything around that stays its own: reduction, clipping, accumulation, loss scaling. A step
    with learning rate 1 would keep only a few digits of a small gradient.
    """

    @unconverted
    def assign(gradient: Any, variable: Any, *args: Any, **kwargs: Any) -> Any:
        return variable.assign(tf.cast(tf.convert_to_tensor(gradient), variable.dtype))

    def assign_sparse(gradient: Any, variable: Any, indices: Any, **kwargs: Any) -> Any:
        return assign(tf.IndexedSlices(gradient, indices, variable.shape), variable)

    optimizer = innermost(optimizer)
    for one in getattr(optimizer, "optimizers", ()):  # of Keras 3's MultiOptimizer
        leave_gradients(one)
    if hasattr(optimizer, "update_step"):
        optimizer.update_step = assign
    else:  # of `tf.keras.optimizers.legacy`
        optimizer._resource_apply_dense = assign
        optimizer._resource_apply_sparse = assign_sparse
