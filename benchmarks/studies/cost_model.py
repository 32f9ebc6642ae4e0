"""What an all-reduce costs, and what synchronization adds to a step: the model, and its fit.

An all-reduce of p workers is a number of steps. In each, a worker sends one message to another:

- recursive doubling: log2(p) steps with the whole payload,
- ring: 2 (p - 1) steps with a p-th of the payload,
- tree: log2(p) steps up and as many down with the whole payload; fewer workers the higher up.

A step takes a latency, and a time per byte. Thakur, Rabenseifner & Gropp, "Optimization of
Collective Communication Operations in MPICH" (2005); their third constant, for the additions, goes
with the bytes here. Two more are needed for several processes on few cores: workers that share a
core take turns and have to be woken up, and Open MPI asks the receiver before a long message.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ALGORITHMS = ("recursive doubling", "ring", "tree")
EAGER_BYTES = 4096
"""What Open MPI 4 sends to a process of the same host without asking (btl_vader_eager_limit)."""

Point = dict[str, Any]
"""A measurement: ``algorithm``, ``workers``, ``length`` and ``seconds``, one value per round."""


class Costs(NamedTuple):
    """What a step costs, in seconds."""

    latency: float
    byte: float
    """For each byte."""
    handshake: float = 0.0
    """For a message of more than `EAGER_BYTES`."""
    wake_up: float = 0.0
    """Where workers share cores."""


Network = dict[str, Costs]
"""The costs by algorithm."""


def network(latency: float, byte: float) -> Network:
    """Returns a network on which all algorithms have the same costs."""
    return dict.fromkeys(ALGORITHMS, Costs(latency, byte))


def steps(algorithm: str, workers: int) -> list[tuple[int, int, float]]:
    """Returns an all-reduce as tuples: how many steps, of how many workers, part of the payload.

    Raises:
        ValueError: there is no such algorithm, or ``workers`` is not a power of two.
    """
    doublings = workers.bit_length() - 1
    if workers != 2**doublings:
        raise ValueError(f"workers must be a power of two. Received: {workers}")
    if algorithm == "recursive doubling":
        return [(doublings, workers, 1.0)]
    if algorithm == "ring":
        return [(2 * (workers - 1), workers, 1 / workers)]
    if algorithm == "tree":
        return [(2, workers >> level, 1.0) for level in range(doublings)]
    raise ValueError(f"algorithm must be one of {ALGORITHMS}. Received: {algorithm!r}")


def terms(algorithm: str, workers: int, length: int, cores: float = math.inf) -> np.ndarray:
    """Returns how often each of the `Costs` is paid in one all-reduce.

    Args:
        algorithm: One of `ALGORITHMS`.
        workers: A power of two.
        length: The length of the payload, in float64 numbers.
        cores: The cores that all workers share; infinite where each has its own.
    """
    total = np.zeros(len(Costs._fields))
    for number, active, part in steps(algorithm, workers):
        size = 8 * length * part
        turns = max(1.0, active / cores)
        total += number * turns * np.array([1, size, size > EAGER_BYTES, active > cores])
    return total


def seconds(network: Network, workers: int, length: int) -> float:
    """Returns the time of an all-reduce by the fastest algorithm, with a core for each worker."""
    return min(float(terms(name, workers, length) @ costs) for name, costs in network.items())


def added(
    network: Network, channels: Sequence[int], workers: int, group: int | None, call: float
) -> float:
    """Returns the seconds that synchronization adds to a step: its collectives, one by one.

    Args:
        network: The network that they go over.
        channels: The channels of each synchronized layer.
        workers: A power of two.
        group: The number of workers that share statistics; ``None`` for all of them.
        call: Seconds in TensorFlow around each collective.
    """
    total = 0.0
    for count in channels:
        forward, backward = 2 * count + 1, 2 * count
        if group is None or group >= workers:
            messages = [(workers, forward), (workers, backward)]
        else:  # over all workers, for the moving statistics
            messages = [(group, forward), (workers, forward), (group, backward)]
        total += sum(call + seconds(network, size, length) for size, length in messages)
    return total


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
