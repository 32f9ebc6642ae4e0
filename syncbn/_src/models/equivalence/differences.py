"""Comparison of arrays: how far they are apart, and whether by a common factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from syncbn._src.text_tables import aligned


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of a quantity, on several replicas and on one."""

    quantity: str
    name: str
    difference: float
    """The largest difference between elements."""
    relative: float
    """The same, relative to the magnitude that `compare` was given."""
    tolerance: float
    """The largest ``relative`` that is ok."""
    ok: bool
    factor: float | None
    """The ratio to the array on one replica; ``None`` if there is no single ratio."""


def compare(
    quantity: str,
    names: Sequence[str],
    actual: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    tolerance: float,
    magnitudes: Sequence[float],
) -> list[Row]:
    """Returns a row for each array.

    Args:
        quantity: What the arrays are.
        names: The names of the arrays.
        actual: Arrays on several replicas, in float64. A dimension more than in ``expected`` is
            that of the replicas, of which the farthest counts.
        expected: Arrays on one replica, in float64.
        tolerance: The largest relative difference that is ok.
        magnitudes: What differences are relative to.
    """
    rows = []
    for name, value, reference, size in zip(names, actual, expected, magnitudes, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = magnitude(value - reference)
            relative = float(np.float64(difference) / size) if difference else 0.0
        # False if not finite.
        ok = relative <= tolerance
        # A factor between arrays that are nearly zero means nothing.
        significant = magnitude(reference) > tolerance * size
        factor = _factor(value, reference, max(tolerance, 0.01)) if significant else None
        rows.append(Row(quantity, name, difference, relative, tolerance, ok, factor))
    return rows


def magnitude(array: np.ndarray) -> float:
    """Returns the largest absolute value; zero for an empty array."""
    return float(np.max(np.abs(array), initial=0.0))


def common_factor(rows: Sequence[Row]) -> float | None:
    """Returns the factor of all rows, if all that differ have one, and it is the same."""
    factors = [row.factor for row in rows if row.factor is not None]
    if not factors or any(row.factor is None for row in rows if not row.ok):
        return None
    slack = max(0.01, *(row.tolerance for row in rows)) * max(map(abs, factors))
    return float(np.median(factors)) if max(factors) - min(factors) <= 2 * slack else None


def _factor(actual: np.ndarray, expected: np.ndarray, slack: float) -> float | None:
    """Returns the least-squares factor, if its residual is within ``slack``."""
    if not np.isfinite(actual).all():  # as where float16 overflows
        return None
    actual = actual.reshape(-1, *expected.shape)
    factor = float(np.sum(actual * expected) / (np.sum(expected * expected) * len(actual)))
    rest = magnitude(actual - factor * expected)
    return factor if rest <= slack * max(abs(factor), slack) * magnitude(expected) else None


_LIMIT = 10
"""The most rows of a quantity in a table."""


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as text, the worst first in each quantity."""
    lines: list[tuple[str, ...]] = [("", "largest difference", "relative", "tolerance", "")]
    for quantity in dict.fromkeys(row.quantity for row in rows):
        own = [row for row in rows if row.quantity == quantity]
        own.sort(key=lambda row: -np.nan_to_num(row.relative, nan=np.inf))
        lines.append((quantity, "", "", "", ""))
        for row in own[:_LIMIT]:
            figures = (f"{v:.1e}" for v in (row.difference, row.relative, row.tolerance))
            lines.append((f"  {row.name}", *figures, "" if row.ok else "DIFFERS"))
        if rest := own[_LIMIT:]:
            differing = sum(not row.ok for row in rest)
            lines.append((f"  and {len(rest)} more, of which {differing} differ", "", "", "", ""))
    return "\n".join(aligned(lines, right=(1, 2, 3)))
