"""Starting the processes of a job, and making sure that none is left running."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import Case
from syncbn._src.bundled.launch.process_groups import end
from syncbn._src.doctor.probe_processes import program_path, root_permission

TERMINATE = 10.0
"""Seconds that a job may take to end when told to."""

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
MULTIWORKER = (sys.executable, str(LAUNCH / "multiworker.py"), "--workers")
HOROVOD = (str(LAUNCH / "horovod.sh"), "-np")

# Variables that a launcher of this process has set for its own ranks.
_INHERITED = ("OMPI_COMM_", "PMI", "PRTE_", "HOROVOD_RANK", "HOROVOD_SIZE", "SLURM_", "TF_CONFIG")


class Engine(NamedTuple):
    """How the processes of an engine are started: ``before``, their number, ``after``."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)
    packages: tuple[str, ...] = ()
    gpu: bool = False
    """Its replicas share the first GPU that TensorFlow sees."""


ENGINES = {
    "alone": Engine(),
    "mirrored": Engine(),
    # The only one that does not hide all GPUs.
    "mirrored-gpu": Engine(
        environment={"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}, gpu=True
    ),
    "multiworker": Engine(MULTIWORKER, ("--",)),
    "horovod-gloo": Engine(HOROVOD, ("--gloo", "--"), packages=("horovod",)),
    # Horovod's default, which launch/horovod.sh changes.
    "horovod-gloo-default": Engine(
        HOROVOD, ("--gloo", "--"), {"HOROVOD_CYCLE_TIME": "1"}, packages=("horovod",)
    ),
    "horovod-mpi": Engine(HOROVOD, ("--mpi", "--"), packages=("horovod", "mpi4py")),
    "mpi": Engine((str(LAUNCH / "mpi.sh"), "-np"), ("--oversubscribe", "--"), {}, ("mpi4py",)),
}
# With oneDNN, or in small pieces, what is freed stays with the process and its size says nothing.
_FOR_MEMORY = {"TF_ENABLE_ONEDNN_OPTS": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
_OF_WORKLOAD = {"memory": _FOR_MEMORY, "resnet50-memory": _FOR_MEMORY}
_ADVICE = {
    "horovod": "syncbn install-horovod",
    "mpi4py": "pip install 'syncbn[mpi]'",
    "tf_keras": "pip install tf_keras",
}
_NO_GPU = (
    "TensorFlow sees no GPU: this needs one of NVIDIA's, its driver, and "
    "pip install 'tensorflow[and-cuda]'"
)


class BenchmarkJob(NamedTuple):
    """Some contestants of a case that share processes."""

    engine: str
    workers: int
    keras: int
    workload: str
    layers: dict[str, str]
    """The layers, by contestant."""

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{self.engine}, {workers}, Keras {self.keras}"


class JobError(Exception):
    """A job has failed; the message says why."""


def jobs_of(case: Case) -> list[BenchmarkJob]:
    """Returns the jobs that a case consists of."""
    jobs: dict[tuple, BenchmarkJob] = {}
    for name, contestant in case.contestants.items():
        key = (contestant.engine, contestant.keras, name if case.alone else "")
        empty = BenchmarkJob(contestant.engine, case.workers, contestant.keras, case.workload, {})
        jobs.setdefault(key, empty).layers[name] = contestant.layer
    return list(jobs.values())


def run(
    job: BenchmarkJob, case: Case, repeats: int, limit: float, tell: Callable[[int], None]
) -> list[dict[str, list[float]]]:
    """Runs a job to its end.

    Args:
        job: One of ``jobs_of(case)``.
        case: The case whose points are measured.
        repeats: How often each is measured.
        limit: The seconds after which all processes of the job are ended.
        tell: Called with the number of points measured, whenever there is another one.

    Returns:
        For each point the seconds or bytes, by contestant.

    Raises:
        JobError: it failed, or reached the limit; with the last lines that it printed.
    """
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        order, results = Path(folder, "order"), Path(folder, "results")
        points = [point._asdict() for point in case.points]
        order.write_text(json.dumps({**job._asdict(), "points": points, "repeats": repeats}))
        results.touch()
        known = 0

        def look() -> None:
            nonlocal known
            done = results.read_bytes().count(b"\n")
            if done > known:
                tell(done)
                known = done

        variables = environment(job.engine, job.workers, job.keras, job.workload)
        worker = ["-m", "benchmarks.measuring.worker", str(order), str(results)]
        log = run_python(job.engine, job.workers, worker, variables, limit, look)
        lines = results.read_text().splitlines()
        if len(lines) != len(points):
            raise JobError(f"{len(lines)} of {len(points)} points\n{log}")
        return [json.loads(line) for line in lines]


def run_python(
    engine: str,
    workers: int,
    arguments: Sequence[str],
    variables: dict[str, str],
    limit: float,
    look: Callable[[], None] = lambda: None,
) -> str:
    """Runs Python in the processes of an engine, until all have ended.

    Args:
        engine: The engine.
        workers: The number of processes, where a launcher starts them.
        arguments: Python's.
        variables: The environment.
        limit: The seconds after which all processes are ended.
        look: Called ten times in a second.

    Returns:
        The last lines that they printed.

    Raises:
        JobError: they failed, or reached the limit; with the last lines.
    """
    before, after, *_ = ENGINES[engine]
    number = [str(workers)] if before else []
    with tempfile.TemporaryFile() as output:
        release = _hold_signals()
        try:
            process = subprocess.Popen(  # noqa: S603  (no shell, no foreign input)
                [*before, *number, *after, sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=variables,
                start_new_session=True,
            )
        except OSError:
            release()
            raise
        try:
            release()
            deadline = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                look()
            in_time = process.poll() is not None
        finally:
            end([process], TERMINATE)
        output.seek(0)
        log = "\n".join(output.read().decode(errors="replace").splitlines()[-25:])
    if not in_time:
        raise JobError(f"no end within {limit:g} s\n{log}")
    if process.returncode:
        raise JobError(f"exit code {process.returncode}\n{log}")
    return log


def missing(engine: str, keras: int = 3) -> str:
    """Returns what has to be installed for an engine and a Keras, or an empty string."""
    packages = [*ENGINES[engine].packages, *(["tf_keras"] if keras == 2 else [])]
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    reasons = [f"{name} is not installed: {_ADVICE[name]}" for name in absent]
    if ENGINES[engine].gpu and _without_gpu():
        reasons.append(_NO_GPU)
    return "; ".join(reasons)


def environment(
    engine: str, workers: int = 1, keras: int = 3, workload: str = ""
) -> dict[str, str]:
    """Returns the environment of a job's processes."""
    # Of several processes, each gets its share of the cores.
    processes = workers if ENGINES[engine].before else 1
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_INHERITED)}
    share = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return {
        "TF_NUM_INTRAOP_THREADS": share,
        "TF_NUM_INTEROP_THREADS": share,
        **inherited,
        **root_permission(),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONUNBUFFERED": "1",
        "PATH": program_path(),
        "TF_USE_LEGACY_KERAS": str(int(keras == 2)),
        **ENGINES[engine].environment,
        **_OF_WORKLOAD.get(workload, {}),
    }


@functools.cache
def _without_gpu() -> bool:
    """Asks TensorFlow, in a process of its own."""
    code = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    output = subprocess.run(  # noqa: S603  (no shell, no foreign input)
        [sys.executable, "-c", code],
        env=environment("mirrored-gpu"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Where TensorFlow gives no answer, the job will say why.
    return output.stdout.strip() == "0"


def _hold_signals() -> Callable[[], None]:
    """Defers signals that end this process until the function that it returns is called.

    One that arrives while a process is being started would leave that process behind.
    """
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)

    return release
