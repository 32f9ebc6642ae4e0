"""The costs of an all-reduce, fitted to measurements; the model is that of the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from syncbn._src.models.network_costs import Costs, terms

Point = dict[str, Any]
"""A measurement: ``algorithm``, ``workers``, ``length`` and ``seconds``, one value per round."""


def fit(points: Sequence[Point], cores: float) -> Costs:
    """Returns the costs, none negative, with the least squares of the relative errors.

    Args:
        points: Measurements of one algorithm.
        cores: The cores that the workers shared.
    """
    rows = np.array([_terms(point, cores) / measured(point) for point in points])
    columns = range(rows.shape[1])
    found, least = np.zeros(len(columns)), math.inf
    # There are so few that every choice of those that are zero can be tried.
    for size in columns:
        for zero in map(list, itertools.combinations(columns, size)):
            used = rows.copy()
            used[:, zero] = 0  # which `lstsq` gives a zero
            values = np.linalg.lstsq(used, np.ones(len(rows)), rcond=None)[0]
            squares = float(((used @ values - 1) ** 2).sum())
            if (values >= 0).all() and squares < least:
                found, least = values, squares
    return Costs(*map(float, found))


def measured(point: Point) -> float:
    """Returns the seconds of a point in the round that was disturbed least by other programs."""
    return min(point["seconds"])


def error(costs: Costs, point: Point, cores: float) -> float:
    """Returns the relative error of the model's time: positive where it is longer than measured."""
    return float(_terms(point, cores) @ costs) / measured(point) - 1


def _terms(point: Point, cores: float) -> np.ndarray:
    return terms(point["algorithm"], point["workers"], point["length"], cores)
