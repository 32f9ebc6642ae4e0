"""What the environment says about the launcher of this process, and whether MPI runs in it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NamedTuple

_SIZE_VARIABLES = {
    "HOROVOD_SIZE": "horovod",  # horovodrun over Gloo
    "OMPI_COMM_WORLD_SIZE": "mpi",  # Open MPI's mpirun, horovodrun over MPI
    "PMI_SIZE": "mpi",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_SIZE": "mpi",  # MVAPICH2
    "SLURM_STEP_NUM_TASKS": "mpi",  # srun (not SLURM_NTASKS: an allocation is not a launch)
}
"""The variables that say how many processes a launcher has started, and for which engine."""


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


def running_mpi() -> Any | None:
    """Returns the module ``mpi4py.MPI`` where MPI is initialized and not finalized, or ``None``."""
    # Looked up, never imported, which would initialize it.
    mpi = sys.modules.get("mpi4py.MPI")
    return None if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() else mpi


def is_elastic() -> bool:
    """Says whether horovodrun has started an elastic job, whose processes come and go."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def require_whole_job(engine: str, size: int, remedy: str) -> None:
    """Refuses an engine that sees one process where a launcher started several, or may do so.

    Raises:
        RuntimeError: statistics would silently be those of one worker.
    """
    launch = launched()
    if size == 1 and (launch.processes > 1 or is_elastic()):
        number = "any number of" if is_elastic() else launch.processes
        variable = "HOROVOD_ELASTIC" if is_elastic() else launch.variable
        raise RuntimeError(
            f"{engine} must see every process of the job. Received: {engine} of size 1, while "
            f"{variable} says that {number} processes were started. {remedy}"
        )


class ClusterTask(NamedTuple):
    """A worker of the cluster that ``TF_CONFIG`` describes."""

    rank: int
    local_rank: int
    """Its number among the workers on its host."""
    workers: int


def cluster_task() -> ClusterTask | None:
    """Returns the worker that this process is, or ``None`` where ``TF_CONFIG`` has no cluster.

    Raises:
        ValueError: ``TF_CONFIG`` has a cluster, or cannot be read, and this process is no worker.
    """
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(text)
        if not config.get("cluster"):
            return None
        task, workers = config["task"], _workers(config)
        rank = list(workers).index((task["type"], int(task["index"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "TF_CONFIG must describe a cluster of workers, and the task of this one. Received: "
            f"TF_CONFIG={text!r} ({error!r}). `syncbn launch multiworker` sets it."
        ) from error
    hosts = [address.rpartition(":")[0] for address in workers.values()]
    return ClusterTask(rank, hosts[:rank].count(hosts[rank]), len(hosts))


def launcher_engine() -> str | None:
    """Returns the engine that a launcher has started this process for, or ``None`` without one.

    ``horovodrun --mpi``, and so ``horovodrun`` alone where Horovod was built with MPI, starts the
    job with ``mpirun`` and sets no variable of Horovod's: it is taken for a job of MPI.

    Raises:
        ValueError: see `cluster_task`.
    """
    if cluster_task() is not None:
        return "tf.distribute"
    for variable, engine in _SIZE_VARIABLES.items():
        # srun sets 1 in an interactive shell, too.
        alone = variable == "SLURM_STEP_NUM_TASKS" and int(os.environ.get(variable) or 1) < 2
        if variable in os.environ and not alone:
            return engine
    return None


def _tf_config_workers() -> int:
    # TensorFlow itself reports a broken TF_CONFIG where it is used; here it counts as none.
    try:
        return len(_workers(json.loads(os.environ.get("TF_CONFIG") or "{}")))
    except (AttributeError, TypeError, ValueError):
        return 0


def _workers(config: Any) -> dict[tuple[str, int], str]:
    """Returns the addresses of the workers in a ``TF_CONFIG``, the chief first, by their tasks.

    Raises:
        AttributeError, TypeError, ValueError: it does not describe a cluster.
    """
    cluster = config.get("cluster") or {}
    return {
        (job, number): address
        for job in ("chief", "worker")
        for number, address in _numbered(cluster.get(job) or [])
    }


def _numbered(tasks: Any) -> list[tuple[int, str]]:
    """Returns the tasks of a job, which are a list, or an object whose keys are their numbers."""
    if isinstance(tasks, dict):
        return sorted((int(number), address) for number, address in tasks.items())
    if not isinstance(tasks, list):
        raise TypeError(f"{tasks!r} is no list of tasks")
    return list(enumerate(tasks))
