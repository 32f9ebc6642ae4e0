"""The engines: whether they are installed, and how two processes start under each."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

from syncbn._src.bundled.launch.process_groups import free_addresses
from syncbn._src.doctor.probe_processes import Command, program_path

_HOROVOD = "`syncbn install-horovod` builds Horovod for this TensorFlow"
_MPI = "pip install 'syncbn[mpi]'"
_ONE_MPI = f"mpirun and mpi4py must be of one MPI library; {_MPI} has both"


class Unusable(Exception):  # noqa: N818  (nobody's mistake)
    """An engine cannot be tried.

    Args:
        status: ``"missing"`` or ``"failed"``.
        reason: Why, or an empty string.
        advice: What to do.
    """

    def __init__(self, status: str, reason: str, advice: str):
        super().__init__(status, reason, advice)
        self.status, self.reason, self.advice = status, reason, advice


def _mirrored(probe: list[str]) -> list[Command]:
    return [Command(probe, {})]


def _multiworker(probe: list[str]) -> list[Command]:
    cluster = {"worker": free_addresses(2)}
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    configs = [json.dumps({"cluster": cluster, "task": task}) for task in tasks]
    return [Command(probe, {"TF_CONFIG": config}) for config in configs]


def _horovod_gloo(probe: list[str]) -> list[Command]:
    _controller("gloo")
    return [Command([horovodrun(), "--gloo", "-np", "2", *probe], {})]


def _horovod_mpi(probe: list[str]) -> list[Command]:
    _controller("mpi")
    path, version = mpirun()
    if "Open MPI) 4." not in version:
        raise Unusable("failed", f"horovodrun needs Open MPI 4, and {path} is {version}", _MPI)
    return [Command([horovodrun(), "--mpi", "-np", "2", *probe], {})]


def _mpi(probe: list[str]) -> list[Command]:
    _mpi4py()
    path, version = mpirun()
    for vendor, flags in _MPIRUN_FLAGS.items():
        if vendor in version:
            return [Command([path, "-np", "2", *flags, *probe], {})]
    raise Unusable("failed", f"{path} is {version}", f"use Open MPI 4 or 5, or MPICH: {_MPI}")


ENGINES: dict[str, tuple[Callable[[list[str]], list[Command]], str]] = {
    "mirrored": (_mirrored, ""),
    "multiworker": (_multiworker, ""),
    "horovod-gloo": (_horovod_gloo, _HOROVOD),
    "horovod-mpi": (_horovod_mpi, _HOROVOD),
    "mpi": (_mpi, _ONE_MPI),
}
"""The function that starts each of them, and what to do if it fails."""

# Ranks are not bound to cores: TensorFlow's threads would queue for them.
_MPIRUN_FLAGS = {
    "Open MPI) 4.": ["--oversubscribe", "--bind-to", "none"],
    "Open MPI) 5.": ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"],
    "HYDRA": ["-bind-to", "none"],
}


def _horovod() -> Any:
    if importlib.util.find_spec("horovod") is None:
        raise Unusable("missing", "", _HOROVOD)
    return _imported("horovod.tensorflow", _HOROVOD)


def _controller(name: str) -> None:
    """Requires that Horovod was built with a controller."""
    if not getattr(_horovod(), f"{name}_built")():
        raise Unusable("missing", f"this Horovod was built without {name}", _HOROVOD)


def describe_horovod() -> str:
    """Says which Horovod this is, and what it was built with."""
    hvd = _horovod()
    parts = [part for part in ("gloo", "mpi", "nccl") if getattr(hvd, f"{part}_built")()]
    return f"{installed('horovod')}, with {', '.join(parts)}"


def _mpi4py() -> Any:
    if importlib.util.find_spec("mpi4py") is None:
        raise Unusable("missing", "", _MPI)
    _imported("mpi4py", _MPI).rc.initialize = False  # this process only asks
    return _imported("mpi4py.MPI", _MPI)


def describe_mpi4py() -> str:
    """Says which mpi4py this is, and which MPI it was built for and finds."""
    mpi = _mpi4py()
    vendor, version = mpi.get_vendor()
    library = mpi.Get_library_version().strip("\0\n ").splitlines()[0].partition(",")[0]
    numbers = ".".join(map(str, version))
    return f"{installed('mpi4py')}, built for {vendor} {numbers}, with {library}"


def _imported(module: str, advice: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # an incompatible library may raise anything
        reason = f"import {module}: {type(error).__name__}: {error}"
        raise Unusable("failed", reason, advice) from error


def mpirun() -> tuple[str, str]:
    """Returns the path of mpirun, and the line of its version that names the MPI library."""
    path = _program("mpirun", _MPI)
    try:
        asked = subprocess.run(  # noqa: S603
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unusable("failed", f"{path} --version: {error}", _MPI) from error
    lines = asked.stdout.splitlines()
    return path, next((line for line in lines if re.search("MPI|HYDRA", line)), "of an unknown MPI")


def horovodrun() -> str:
    """Returns the path of horovodrun."""
    return _program("horovodrun", _HOROVOD)


def _program(name: str, advice: str) -> str:
    path = shutil.which(name, path=program_path())
    if path is None:
        raise Unusable("missing", f"no {name}", advice)
    return path


def installed(package: str) -> str:
    """Returns the version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
