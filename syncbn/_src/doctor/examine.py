"""What this machine has for synchronized training, and whether it works."""

from __future__ import annotations

import functools
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from syncbn._src.communicators import horovod_settings
from syncbn._src.doctor import engines, probe_processes
from syncbn._src.version import VERSION


class Result(NamedTuple):
    """The result of trying an engine."""

    engine: str
    status: str
    """``"ok"``, ``"failed"`` or ``"missing"``."""
    milliseconds: float | None = None
    """The latency of an all-reduce of 129 float64 numbers."""
    reason: str = ""
    """Why it is not ok."""
    advice: str = ""
    """What to do."""
    output: str = ""
    """The end of the processes' output, where they failed."""

    def __str__(self) -> str:
        words = {"ok": f"ok {self.milliseconds or 0:.2f} ms", "missing": "not installed"}
        line = ": ".join(
            filter(None, [words.get(self.status, self.status), self.reason, self.advice])
        )
        return "\n    | ".join([line, *self.output.splitlines()])


def describe_machine() -> dict[str, str]:
    """Returns what this machine has, in words."""
    gpus = [
        tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return {
        "Python": f"{platform.python_version()}, {sys.executable}",
        "syncbn": VERSION,
        "TensorFlow": tf.__version__,
        "tf.keras": _in_words(_keras_in_use),
        "Keras": engines.installed("keras"),
        "tf_keras": engines.installed("tf_keras"),
        "CPU cores": str(len(os.sched_getaffinity(0))),
        "GPUs": ", ".join(gpus) or "none",
        "Horovod": _in_words(engines.describe_horovod),
        "mpi4py": _in_words(engines.describe_mpi4py),
        "mpirun": _in_words(lambda: ", ".join(engines.mpirun())),
        "horovodrun": _in_words(engines.horovodrun),
    }


def _keras_in_use() -> str:
    """Says which Keras `tf.keras` is."""
    name, problem = _keras_and_problem()
    if problem:  # with which each engine's layers would fail too, in more words
        raise engines.Unusable("failed", problem, "")
    return name


@functools.cache  # TensorFlow does not try twice to import its Keras
def _keras_and_problem() -> tuple[str, str]:
    try:
        from syncbn._src.keras_compat import keras_api
    except ImportError as error:
        return "", str(error)
    return "Keras 3" if keras_api.KERAS_3 else "tf_keras", ""


def try_out(engine: str, limit: float) -> Result:
    """Runs an engine, in processes that are ended after ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "seconds")
        probe = [sys.executable, "-m", "syncbn._src.doctor.probe", engine, str(file)]
        commands, advice = engines.ENGINES[engine]
        try:
            _keras_in_use()
            reason, output = probe_processes.run(commands(probe), limit)
        except engines.Unusable as unusable:
            return _unusable(engine, unusable)
        if reason:
            return Result(engine, "failed", None, reason, _proxy(engine) or advice, output)
        seconds = float(file.read_text())
    return Result(engine, "ok", 1e3 * seconds, advice="; ".join(_hints(engine)))


def _unusable(engine: str, unusable: engines.Unusable) -> Result:
    return Result(engine, unusable.status, None, unusable.reason, unusable.advice)


def _hints(engine: str) -> Iterator[str]:
    if engine.startswith("horovod"):
        controller = engine.removeprefix("horovod-")
        yield f"with {horovod_settings.in_force(controller, 2)}"
        yield from filter(None, [horovod_settings.advice(controller, 2)])
    if engine in ("mpi", "horovod-mpi") and probe_processes.root_needs():
        yield f"jobs that root starts need {probe_processes.root_needs()}"


def _proxy(engine: str) -> str:
    proxies = [name for name in ("grpc_proxy", "https_proxy", "http_proxy") if name in os.environ]
    if engine != "multiworker" or not proxies:
        return ""
    return f"{proxies[0]} keeps workers from reaching each other; list their hosts in no_proxy"


def _in_words(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except engines.Unusable as unusable:
        return str(_unusable("", unusable))
