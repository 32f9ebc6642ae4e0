"""Timing in turn, and the summary of the times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

WARMUP = 3
"""Steps of each that are not counted, since they trace, and fill caches."""


def alternate(
    steps: dict[str, Callable[[], object]],
    repeats: int,
    meet: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Returns the seconds of each step; they take turns, so that all meet the same disturbances.

    Args:
        steps: The steps, by contestant.
        repeats: The number of each that are counted.
        meet: Waits for the other workers, so that no step pays for the lateness of the one before.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(WARMUP + repeats):
        for name, step in steps.items():
            meet()
            begin = time.perf_counter()
            step()
            if repeat >= WARMUP:
                times[name].append(time.perf_counter() - begin)
    return times


class Summary(NamedTuple):
    """The summary of many measurements."""

    median: float
    lower: float
    upper: float
    """Quartiles."""
    samples: int


def summary(rounds: list[list[float]]) -> Summary:
    """Returns the median of the rounds' medians, and the quartiles of all their measurements."""
    values = [value for one in rounds for value in one]
    lower, _, upper = statistics.quantiles(values, method="inclusive") if values[1:] else values * 3
    return Summary(statistics.median(map(statistics.median, rounds)), lower, upper, len(values))
