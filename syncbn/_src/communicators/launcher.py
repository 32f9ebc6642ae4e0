"""What the environment says about the launcher that started this process."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

_SIZE_VARIABLES = (
    "HOROVOD_SIZE",  # horovodrun over Gloo
    "OMPI_COMM_WORLD_SIZE",  # Open MPI's mpirun, horovodrun over MPI
    "PMI_SIZE",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "SLURM_STEP_NUM_TASKS",  # srun (not SLURM_NTASKS: an allocation is not a launch)
)


class Launch(NamedTuple):
    """How many processes were started together, and the variable that says so."""

    processes: int
    variable: str | None


def launched() -> Launch:
    """Returns the largest job that the environment indicates; one process if it indicates none."""
    found = Launch(1, None)
    for variable in _SIZE_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > found.processes:
            found = Launch(int(value), variable)
    workers = _tf_config_workers()
    return Launch(workers, "TF_CONFIG") if workers > found.processes else found


def require_whole_job(engine: str, size: int, remedy: str) -> None:
    """Refuses an engine that sees one process where a launcher started several.

    Raises:
        RuntimeError: statistics would silently be those of one worker.
    """
    launch = launched()
    if size == 1 and launch.processes > 1:
        raise RuntimeError(
            f"{engine} must see every process of the job. Received: {engine} of size 1, while "
            f"{launch.variable} says that {launch.processes} processes were started. {remedy}"
        )


def _tf_config_workers() -> int:
    # TensorFlow itself reports a broken TF_CONFIG where it is used; here it counts as none.
    try:
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
    except json.JSONDecodeError:
        return 0
    cluster = config.get("cluster") if isinstance(config, dict) else None
    jobs = [cluster.get(job) for job in ("chief", "worker")] if isinstance(cluster, dict) else []
    # The tasks of a job are a list, or an object whose keys are their numbers.
    return sum(len(tasks) for tasks in jobs if isinstance(tasks, list | dict))
