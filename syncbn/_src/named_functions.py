"""Functions that a user names on the command line, as ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


class UsageError(ValueError):
    """What a user has asked for on the command line cannot be done; the message says why."""


def named_function(name: str) -> Callable[..., Any]:
    """Returns the function that ``module:function`` names; the working folder is looked in first.

    Raises:
        UsageError: there is no such module or function. Other errors are those of the module.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path or module_name.startswith("."):
        raise UsageError(f"A function is given as module:function. Received: {name}")
    if module_name.endswith(".py"):
        raise UsageError(f"A module is given by its name, without .py. Received: {name}")
    folder = os.getcwd()
    # `python -m` looks there too; a script, such as `syncbn`, in its own folder instead.
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"There is no module {error.name}. Received: {name}, looked for in {folder} and in "
            "this Python's environment."
        ) from error
    function = getattr(module, path, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {path}. Received: {name}")
    return function
