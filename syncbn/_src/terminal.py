"""What commands print: in color on a terminal, plain anywhere else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping

from syncbn._src.communicators.launcher import launched

BAD, DOUBTFUL, GOOD, HEADING = "bold red", "yellow", "green", "bold"
"""Styles of rich."""


def show(thing: object, styles: Mapping[str, str], end: str = "\n") -> None:
    """Prints something, in the same words everywhere.

    Rich, which Keras 3 brings along, colors where the output is a terminal, and heeds ``NO_COLOR``
    and ``TERM=dumb``.

    Args:
        thing: What to print.
        styles: The styles of what regular expressions find in it.
        end: What follows it.
    """
    # A rank of Open MPI has a terminal of its own, wherever mpirun's output goes.
    terminal = sys.stdout.isatty() and launched().processes == 1
    if not terminal or importlib.util.find_spec("rich") is None:
        print(thing, end=end, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text(str(thing))  # whose brackets are no markup
    for expression, style in styles.items():
        text.highlight_regex(expression, style)
    Console().print(text, end=end, highlight=False, soft_wrap=True)
