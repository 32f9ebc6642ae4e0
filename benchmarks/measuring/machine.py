"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from syncbn._src.doctor import engines

PACKAGES = ("syncbn", "tensorflow", "keras", "tf_keras", "horovod", "mpi4py", "numpy")


def describe() -> dict[str, str]:
    """Returns what a reader needs to know of this machine, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [
        line.partition(":")[2].strip()
        for file in Path("/proc/driver/nvidia/gpus").glob("*/information")
        for line in file.read_text().splitlines()
        if line.startswith("Model")
    ]
    try:
        _, mpi = engines.mpirun()
    except engines.Unusable as error:
        mpi = error.reason
    return {
        "CPU": models[0] if models else platform.machine(),
        "GPU": ", ".join(gpus) or "none",
        "cores": str(len(os.sched_getaffinity(0))),
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: engines.installed(name) for name in PACKAGES},
        "MPI": mpi,
    }


def load() -> str:
    """Returns the processes that wanted a core: means over the last 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())
