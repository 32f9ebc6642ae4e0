"""Arguments that many functions have."""

from __future__ import annotations

import operator
from typing import Any


def at_least_one(name: str, value: Any, otherwise: str = "") -> int:
    """Returns the argument ``name`` as a positive integer.

    Args:
        name: Its name.
        value: What was given.
        otherwise: What else it may be, for the message.

    Raises:
        ValueError: it is not one.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except (AttributeError, TypeError):  # as some arrays and tensors raise
        number = 0
    if number < 1:
        raise ValueError(
            f"`{name}` must be a positive integer{otherwise}. Received: {name}={value!r}."
        )
    return number
