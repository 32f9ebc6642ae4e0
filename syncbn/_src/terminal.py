"""What commands print: in color on a terminal, plain anywhere else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

BAD, DOUBTFUL, GOOD, HEADING = "bold red", "yellow", "green", "bold"
"""Styles of rich."""


def show(thing: Any, styles: Mapping[str, str] | None = None, end: str = "\n") -> None:
    """Prints something.

    Rich, which Keras 3 brings along, colors where the output is a terminal, and heeds ``NO_COLOR``
    and ``TERM=dumb``. Pipes and files get ``str(thing)``, in lines of any length.

    Args:
        thing: What to print; on a terminal its ``__rich__``, if it has that.
        styles: Of a thing without ``__rich__``: the styles of what regular expressions find in it.
        end: What follows it.
    """
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(thing, end=end, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    if not hasattr(thing, "__rich__"):
        thing = Text(str(thing))  # whose brackets are no markup
        for expression, style in (styles or {}).items():
            thing.highlight_regex(expression, style)
    Console(soft_wrap=True).print(thing, end=end, highlight=False)
