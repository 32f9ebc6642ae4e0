"""What an all-reduce costs, and what synchronization adds to a step: a model.

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

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALGORITHMS = ("recursive doubling", "ring", "tree")
EAGER_BYTES = 4096
"""What Open MPI 4 sends to a process of the same host without asking (btl_vader_eager_limit)."""


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
