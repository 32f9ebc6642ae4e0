"""Subclasses that pass for the class itself, for objects that are changed in place."""

from __future__ import annotations

import functools
from typing import Any

from syncbn._src.keras_compat.keras_api import register_keras_serializable


@functools.cache
def disguised_class(mixin: type, cls: Any, registered_name: str = "") -> Any:
    """Returns a subclass of ``mixin`` and ``cls``, of which users see what they see of ``cls``.

    Args:
        mixin: What overrides methods of ``cls``. It finds that as its ``_plain_class``.
        cls: The class of the object.
        registered_name: The name under which Keras saves it, or ``""`` where it does not.
    """
    members = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    # The metaclass is that of `cls`.
    made = type(cls)(cls.__name__, (mixin, cls), {**members, "_plain_class": cls})
    if not registered_name:
        return made
    return register_keras_serializable("syncbn", registered_name)(made)
