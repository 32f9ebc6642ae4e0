"""What goes wrong on one rank, and what then has to become of the job."""

import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests import processes

PROGRAM = Path(__file__).resolve().parents[1] / "programs" / "faulty_loop.py"
LAUNCH = processes.ROOT / "launch"
WARN, END = 4, 8
"""Seconds that a rank waits until it says so, and until the job ends."""
LAUNCHERS = {
    "mpi": ("mpi", [str(LAUNCH / "mpi.sh"), "-np", "2", "--oversubscribe"]),
    "horovod-gloo": ("horovod", [str(LAUNCH / "horovod.sh"), "-np", "2", "--gloo"]),
    "horovod-mpi": ("horovod", [str(LAUNCH / "horovod.sh"), "-np", "2", "--mpi"]),
    "multiworker": (
        "multiworker",
        [sys.executable, str(LAUNCH / "multiworker.py"), "--workers", "2"],
    ),
}
WAITS = r"rank 0 has waited \d+ s in \S*syncbn/\w+/\w+ \(call \d+\); rank 1 \(process \d+ on \S+\) "
SAYS = {
    "none": None,
    "is NaN": None,
    "is slow": None,
    "starts late": None,
    "raises": "ValueError: the fault",
    "pipeline raises": "ValueError: the fault",
    "out of memory": "(OOM|ResourceExhausted|bad_alloc|allocat)",
    "ends": r"rank 1 \(process \d+ on \S+\) has ended.*ran out of batches, syncbn\.training\.join",
    "exits with 3": r"rank 1 \(process \d+ on \S+\) has ended",
    "is killed": "(signal 9|SIGKILL|Exit code: 137|is gone without a word)",
    "is stopped": WAITS + "has not answered",
    "is stopped for 8 s": WAITS + "has not answered",
    "sleeps": WAITS + "is in no collective",
    "other order": "(second|first)/statistics",
    "skips one": "(second|first)/(statistics|gradient)",
    "other channels": "(third|first)/statistics",
}
"""By fault: what somebody says, by a pattern; ``None`` where the job goes on, and ends well."""


class Outcome(NamedTuple):
    """What has become of a job."""

    code: int
    seconds: float
    output: str

    def says(self, fault):
        """What was said of the fault, or nothing."""
        found = re.search(SAYS[fault], self.output) if SAYS[fault] else None
        if found is None:
            return ""
        start, end = (
            self.output.rfind("\n", 0, found.start()),
            self.output.find("\n", found.end()),
        )
        return self.output[start + 1 : end].strip()


def run(launcher, fault, folder):
    """Runs a job with a fault; its records go into ``folder``."""
    engine, command = LAUNCHERS[launcher]
    end = 30 if fault == "is stopped for 8 s" else END
    limits = {"SYNCBN_WARN_SECONDS": str(WARN), "SYNCBN_RECORDS": str(folder)}
    started = time.monotonic()
    finished = processes.run(
        [
            (
                launcher,
                [
                    *command,
                    "--timeout",
                    str(end),
                    "--",
                    sys.executable,
                    str(PROGRAM),
                    engine,
                    fault,
                ],
                limits,
            )
        ],
        takes=60,
    )
    # Open MPI puts its marks into lines that Python writes in pieces.
    output = re.sub(r"\[\d+,\d+\]<std\w+>:", "", finished.output)
    return Outcome(finished.code, time.monotonic() - started, output)


def wrong_with(launcher, fault, outcome):
    """Returns in words what is wrong with an outcome; nothing where it is what was promised."""
    if outcome.code == 124:
        return "it was ended by the limit of the test"
    done = re.findall(r"rank \d is done: (.*)", outcome.output)
    if SAYS[fault] is None or goes_on(launcher, fault):
        alike = len(set(done)) == 1 or fault == "is NaN"
        return "" if outcome.code == 0 and len(done) == 2 and alike else "it did not go on"
    if outcome.code == 0 or done:
        return "it ended as if nothing had happened"
    return "" if outcome.says(fault) else f"nobody said {SAYS[fault]}"


def goes_on(launcher, fault):
    """Whether a job survives a fault."""
    return fault == "is stopped for 8 s"
