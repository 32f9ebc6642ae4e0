"""Synchronized batch normalization and centering for TensorFlow, over any engine."""

import typing as _typing
from importlib import import_module as _import_module

from syncbn._src.command_start import starts_a_command as _starts_a_command
from syncbn._src.version import VERSION as _VERSION

__version__ = _VERSION

# By this name type checkers know it.
if _typing.TYPE_CHECKING or not _starts_a_command():
    from syncbn._src.interface import *
    from syncbn._src.interface import __all__
else:
    # `syncbn --help` does not wait for TensorFlow; a user's module that a command imports has all
    # names nevertheless (PEP 562). Elsewhere they are not lazy: a file with these layers can be
    # loaded once `syncbn` is imported, whether or not any name of it is used.
    def __getattr__(name: str) -> _typing.Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_import_module("syncbn._src.interface"), name)
