"""The optimizers of a model, of which one with a `train_step` of its own may have several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from syncbn._src.keras_compat.keras_api import OPTIMIZERS
from syncbn._src.keras_compat.optimizer_state import (
    create_optimizer_state,
    finds_state_by_variable,
    has_state,
    inner_optimizer,
)


def optimizers_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """Returns a model's optimizer, and the others that are its attributes, by their names.

    An attribute may also be a list, a tuple or a dictionary of optimizers. They come in the order
    of their names, the same on all workers, behind ``optimizer``.

    Args:
        model: A model of `tf.keras`.
        optimizer: The one that stands for ``model.optimizer``, or ``None``.
    """
    named: dict[str, Any] = {}
    for attribute, value in sorted(vars(model).items()):
        if not attribute.startswith("_self_"):  # TensorFlow's own, which has them a second time
            named.update(_named(attribute, value))
    compiled_with = getattr(model, "optimizer", None)
    known = [optimizer, compiled_with]
    # Keras may have wrapped an attribute in one that scales the loss.
    known += [inner_optimizer(one) for one in (optimizer, compiled_with, *named.values())]
    found = {} if optimizer is None else {"optimizer": optimizer}
    for name, one in named.items():
        if not any(one is other for other in known):
            known.append(one)
            found[name] = one
    return found


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, OPTIMIZERS):
        yield name, value
        return
    pairs: Any = ()
    if isinstance(value, list | tuple):
        pairs = enumerate(value)
    elif isinstance(value, dict):
        pairs = sorted(value.items(), key=str)
    for key, one in pairs:
        if isinstance(one, OPTIMIZERS):
            yield f"{name}[{key!r}]", one


def create_states(optimizers: Mapping[str, Any], variables: Sequence[Any]) -> None:
    """Makes optimizers create their state now, unless they have.

    Only for the model's own it is known which variables it trains.

    Args:
        optimizers: As from `optimizers_of`.
        variables: The variables that the model trains.

    Raises:
        ValueError: another one has none.
    """
    for name, optimizer in optimizers.items():
        if name == "optimizer" or finds_state_by_variable(optimizer):
            create_optimizer_state(optimizer, variables)
        elif not has_state(optimizer):
            raise ValueError(
                "Where a model has several optimizers, it must be known which variables each of "
                f"them trains. Received: {name}, of {type(optimizer).__name__}, which is not "
                f"built. Build it first: model.{name}.build(variables). If it trains nothing, "
                "take it off the model."
            )
