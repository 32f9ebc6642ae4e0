"""Starting processes from tests: a hard limit, no orphans, and every rank's output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import process_groups

from tests import patience

TERMINATE = 3  # seconds, in which a launcher passes the signal on to its ranks

ROOT = Path(__file__).resolve().parent.parent

# What a launcher, pytest-xdist, or a test that was itself launched, leaves behind for its children.
_INHERITED = (
    *("OMPI_", "PMI", "PRTE_", "HOROVOD_", "SLURM_", "TF_CONFIG"),
    *("PYTEST_XDIST", "SYNCBN_TEST"),
)


class Finished(NamedTuple):
    """How processes ended: the first code that is not zero, and all of their output."""

    code: int
    output: str


def environment(hide=True, **changes):
    """This process's environment without what launchers set, with ``changes``.

    With ``hide`` scikit-learn and matplotlib are not found. Keras imports both wherever they are
    installed, which is a third of what it takes to start.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if k == patience.VARIABLE or not k.startswith(_INHERITED)
    }
    # The ranks of a test share this machine's few cores, and root may run MPI in a container.
    shared = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # Who waits gives way to the ranks of whatever runs beside it.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), kept.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "SYNCBN_RECORDS": tempfile.gettempdir(),
    }
    folders = ["startup", "hidden"] if hide else ["startup"]
    paths = [*(str(ROOT / "tests" / folder) for folder in folders), kept.get("PYTHONPATH", "")]
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return {**kept, **shared, **changes}


def run(commands, *, takes=12, env=None, hide=True, cwd=ROOT):
    """Runs commands in parallel, and ends all of them when one fails or they hang.

    A rank of `tests/parallel` or `tests/sessions` that hangs ends itself a little before that, and
    shows where: ``SYNCBN_TEST_LIMIT`` tells it when.

    Args:
        commands: A list of (label, argument list, environment changes).
        takes: The seconds that they take on a quiet machine, for `patience.limit`.
        env: Environment changes for all of them.
        hide: Whether scikit-learn and matplotlib are hidden from them.
        cwd: The folder that they run in.
    """
    limit = patience.limit(takes)
    env = {"SYNCBN_TEST_LIMIT": str(0.9 * limit), **(env or {})}
    with contextlib.ExitStack() as stack:
        started = []
        for label, command, changes in commands:
            log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=environment(hide, **env, **changes),
                start_new_session=True,
            )
            stack.callback(process_groups.end, [process], TERMINATE)
            started.append((label, process, log))
        deadline = time.monotonic() + limit
        verdict = ""
        while any(process.poll() is None for _, process, _ in started):
            if any(process.poll() for _, process, _ in started):
                verdict = "one process failed, so the others were ended"
                process_groups.settle([process for _, process, _ in started], 5)
                break
            if time.monotonic() > deadline:
                verdict = f"ended after the limit of {limit:g} s"
                break
            time.sleep(0.05)
        codes = [process.poll() for _, process, _ in started]
        process_groups.end([process for _, process, _ in started], TERMINATE)
        output = "".join(f"----- {label}\n{_read(log)}" for label, _, log in started)
        failed = [code for code in codes if code] + [124 for code in codes if code is None]
        return Finished(failed[0] if failed else 0, f"{output}\n{verdict}")


def unwoven(output):
    """Returns what launchers have woven with the output of each rank in one piece.

    They tag what a rank writes, which may be a part of a line.
    """
    before, *tagged = re.split(r"\[(?:1,)?(\d+)\]<std(?:out|err)>:", output)
    ranks = {}
    for rank, text in zip(tagged[::2], tagged[1::2], strict=True):
        ranks[rank] = ranks.get(rank, "") + text
    return "\n".join([before, *ranks.values()])


def mpirun(size, *command):
    """The command that runs ``command`` in ``size`` processes under Open MPI."""
    return ["mpirun", "--oversubscribe", "--tag-output", "-np", str(size), *command]


def horovodrun(size, controller, *command):
    """The command that runs ``command`` in ``size`` processes under Horovod."""
    return ["horovodrun", f"--{controller}", "-np", str(size), *command]


def program(name, *arguments):
    """The command that runs a program of `tests/programs`."""
    return [sys.executable, "-m", f"tests.programs.{name}", *arguments]


def workers(size, *command):
    """The commands of ``size`` workers of one tf.distribute cluster on this machine."""
    hosts = process_groups.free_addresses(size)
    return [
        (
            f"worker {rank}",
            list(command),
            {
                "TF_CONFIG": json.dumps(
                    {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": rank}}
                )
            },
        )
        for rank in range(size)
    ]


def python(code, **env):
    """Runs a few lines of Python in a process of its own; more of them go into a `program`."""
    return run([("python", [sys.executable, "-c", code], {})], env=env)


def left(marker):
    """The processes with ``marker`` in their command lines, once they have had the time to end."""
    deadline = time.monotonic() + patience.limit()
    while True:
        found = []
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                command = Path("/proc", process, "cmdline").read_text(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            if marker in command:
                found.append(process)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _read(log):
    log.seek(0)
    return log.read()
