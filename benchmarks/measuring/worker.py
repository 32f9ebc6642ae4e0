"""One process of a job: runs the measurements, which rank 0 writes down.

usage: python -m benchmarks.measuring.worker ORDER.json RESULTS.jsonl
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.cases import Point
from benchmarks.measuring.workloads import WORKLOADS


def main(order_file: str, results_file: str) -> None:
    """Writes a line for each point, as soon as it is measured."""
    order = json.loads(Path(order_file).read_text())
    workload = WORKLOADS[order["workload"]]
    replicas = workload.join(order["engine"], order["workers"])
    for fields in order["points"]:
        point = Point(**{**fields, "shape": tuple(fields["shape"])})
        samples = workload.measure(replicas, order["layers"], point, order["repeats"])
        if replicas.rank == 0:
            with open(results_file, "a") as file:
                file.write(json.dumps(samples) + "\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        # MPI waits for all ranks when one wants to end, also for those that wait for this one.
        if "mpi4py.MPI" in sys.modules:
            traceback.print_exc()
            sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(1)
        raise
