"""Times of MPI's all-reduce alone: by algorithm, number of workers and length of the payload."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import jobs, machine

ALGORITHMS = {"recursive doubling": 3, "ring": 4, "tree": 2}
"""The numbers that Open MPI 4 gives them."""
WORKERS = (2, 4, 8)
LENGTHS = (1, *(2 * 2**power + 1 for power in range(6, 12)), 2**14, 2**16, 2**17)
"""Of payloads in float64: one number, ResNet-50's (2 C + 1 for C channels), and up to 1 MiB."""
LIMIT = 60.0
"""Seconds that a job may take."""

# Other load on the machine only adds to the time; among many short loops some are spared.
_LOOPS, _LOOP_SECONDS = 60, 1e-3


def measure_all_reduces(rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measures every algorithm with every number of workers; they take turns.

    Args:
        rounds: The number of rounds.
        tell: Called with what is being measured.

    Returns:
        JSON-serializable: the machine, and for each point its seconds, one value per round.

    Raises:
        jobs.JobError: a job failed, or was not done within `LIMIT`.
    """
    if missing := jobs.missing("mpi"):
        raise jobs.JobError(missing)
    found: dict[tuple[str, int, int], list[float]] = {}
    loads = [machine.load()]
    for number in range(1, rounds + 1):
        for workers in WORKERS:
            for algorithm in ALGORITHMS:
                tell(f"round {number}/{rounds}: {algorithm}, {workers} workers")
                for length, seconds in zip(LENGTHS, run(algorithm, workers), strict=True):
                    # Open MPI has no ring in which a worker's part would be empty.
                    if algorithm != "ring" or length >= workers:
                        found.setdefault((algorithm, workers, length), []).append(seconds)
    loads.append(machine.load())
    return {
        "machine": {**machine.describe(), "load before and after": "; ".join(loads)},
        "cores": len(os.sched_getaffinity(0)),
        "points": [
            {"algorithm": algorithm, "workers": workers, "length": length, "seconds": seconds}
            for (algorithm, workers, length), seconds in found.items()
        ],
    }


def run(algorithm: str, workers: int) -> list[float]:
    """Returns the least seconds that the first worker saw, for each of `LENGTHS`.

    Raises:
        jobs.JobError: the job failed, or was not done within `LIMIT`; all its processes are ended.
    """
    chosen = {
        "coll_tuned_use_dynamic_rules": 1,
        "coll_tuned_allreduce_algorithm": ALGORITHMS[algorithm],
        # The tree consists of these two; both are binomial.
        "coll_tuned_reduce_algorithm": 5,
        "coll_tuned_bcast_algorithm": 6,
    }
    variables = {
        **jobs.environment("mpi", workers),
        **{f"OMPI_MCA_{name}": str(value) for name, value in chosen.items()},
    }
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        results = Path(folder, "results")
        arguments = ["-m", "benchmarks.studies.all_reduce", str(results)]
        jobs.run_python("mpi", workers, arguments, variables, LIMIT)
        return json.loads(results.read_text())


def _work(results: Path) -> None:
    """Measures the chosen algorithm, in each worker."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    buffers = [(np.ones(length), np.empty(length)) for length in LENGTHS]

    def loop(payload: np.ndarray, total: np.ndarray, calls: int) -> float:
        world.Barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            world.Allreduce(payload, total)
        return (time.perf_counter() - begin) / calls

    # All workers make as many calls as the first one finds right.
    calls = [
        world.bcast(max(1, int(_LOOP_SECONDS / min(loop(*both, 5) for _ in range(5)))))
        for both in buffers
    ]
    least = [math.inf] * len(LENGTHS)
    for _ in range(_LOOPS):
        for index, (both, number) in enumerate(zip(buffers, calls, strict=True)):
            least[index] = min(least[index], loop(*both, number))
    if world.rank == 0:
        results.write_text(json.dumps(least))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
