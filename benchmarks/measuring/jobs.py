"""Starting the processes of a job, and making sure that none is left running."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import Case
from syncbn._src.bundled.launch.process_groups import end

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

    def missing(self) -> str:
        """Returns what has to be installed for it, or an empty string."""
        engine = ENGINES[self.engine]
        packages = [*engine.packages, *(["tf_keras"] if self.keras == 2 else [])]
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        reasons = [f"{name} is not installed: {_ADVICE[name]}" for name in absent]
        if engine.gpu and _without_gpu():
            reasons.append(_NO_GPU)
        return "; ".join(reasons)


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
        order, results, log = (Path(folder, name) for name in ("order", "results", "log"))
        points = [point._asdict() for point in case.points]
        order.write_text(json.dumps({**job._asdict(), "points": points, "repeats": repeats}))
        results.touch()
        engine = ENGINES[job.engine]
        number = [str(job.workers)] if engine.before else []
        worker = [sys.executable, "-m", "benchmarks.measuring.worker", str(order), str(results)]
        with log.open("wb") as output:
            release = _hold_signals()
            try:
                process = subprocess.Popen(  # noqa: S603  (no shell, no foreign input)
                    [*engine.before, *number, *engine.after, *worker],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment(job),
                    start_new_session=True,
                )
            except OSError:
                release()
                raise
            try:
                release()
                _wait(process, results, limit, tell)
            except subprocess.TimeoutExpired:
                raise JobError(f"no end within {limit:g} s\n{tail(log)}") from None
            finally:
                end([process], TERMINATE)
        lines = results.read_text().splitlines()
        if process.returncode or len(lines) != len(points):
            reason = f"exit code {process.returncode}, {len(lines)} of {len(points)} points"
            raise JobError(f"{reason}\n{tail(log)}")
        return [json.loads(line) for line in lines]


def environment(job: BenchmarkJob) -> dict[str, str]:
    """Returns the environment of a job's processes."""
    # Of several processes, each gets its share of the cores.
    processes = job.workers if ENGINES[job.engine].before else 1
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_INHERITED)}
    share = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return {
        "TF_NUM_INTRAOP_THREADS": share,
        "TF_NUM_INTEROP_THREADS": share,
        **inherited,
        **(root if os.geteuid() == 0 else {}),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join(
            [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        ),
        "TF_USE_LEGACY_KERAS": str(int(job.keras == 2)),
        **ENGINES[job.engine].environment,
        **_OF_WORKLOAD.get(job.workload, {}),
    }


@functools.cache
def _without_gpu() -> bool:
    """Asks TensorFlow, in a process of its own."""
    code = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    output = subprocess.run(  # noqa: S603  (no shell, no foreign input)
        [sys.executable, "-c", code],
        env=environment(BenchmarkJob("mirrored-gpu", 1, 3, "", {})),
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Where TensorFlow gives no answer, the job will say why.
    return output.stdout.strip() == "0"


def mpi_version() -> str:
    """Returns the version line of the first `mpirun`, or an empty string."""
    mpirun = shutil.which("mpirun", path=environment(BenchmarkJob("mpi", 1, 3, "", {}))["PATH"])
    if mpirun is None:
        return ""
    command = [mpirun, "--version"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603
    return output.stdout.partition("\n")[0]


def _wait(
    process: subprocess.Popen[bytes], results: Path, limit: float, tell: Callable[[int], None]
) -> None:
    deadline, known = time.monotonic() + limit, 0
    while process.poll() is None:
        time.sleep(0.1)
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, limit)
        done = results.read_bytes().count(b"\n")
        if done > known:
            tell(done)
            known = done


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


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])
