"""Whether the package is imported to run its command line, which needs no TensorFlow at first."""

from __future__ import annotations

import itertools
import os
import sys

_IMPORTING = ("importlib", "_frozen_importlib")


def starts_a_command() -> bool:
    """Says whether ``python -m syncbn``, or the script ``syncbn``, is what imports the package.

    Where that cannot be told, it is false: then a command starts more slowly, and nothing is wrong.
    To be called while the package is imported.
    """
    frame = sys._getframe(1).f_back  # the first is the package itself
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_IMPORTING):
        frame = frame.f_back
    if frame is None:
        return False
    importer = frame.f_globals.get("__name__")
    if importer == "__main__":
        return os.path.basename(frame.f_globals.get("__file__") or "") == "syncbn"
    arguments = sys.orig_argv
    return importer == "runpy" and ("-m", "syncbn") in itertools.pairwise(arguments)
