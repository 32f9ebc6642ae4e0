"""Tables of text: aligned for `print`, and as rich draws them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Returns a line for each row, with the cells of a column one below the other.

    Args:
        rows: Of as many cells each, the headings first.
        right: The columns that end, rather than begin, in line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def with_rule(rows: Sequence[Sequence[str]], notes: Sequence[str], right: Container[int]) -> str:
    """Returns the rows, `aligned`, with a rule below the headings and notes below them all."""
    headings, *lines = aligned(rows, right)
    rule = "-" * max(map(len, [headings, *lines]))
    return "\n".join([headings, rule, *lines, *notes])


def rich_table(rows: Sequence[Sequence[str]], notes: Sequence[str], right: Container[int]) -> Any:
    """Returns the same for rich."""
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    headings, *others = rows
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column in right else "left")
    for row in others:
        table.add_row(*map(Text, row))  # not strings, whose brackets rich takes for styles
    return Group(table, *map(Text, notes))
