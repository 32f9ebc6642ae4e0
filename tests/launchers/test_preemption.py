"""Launchers that are told to end: the ranks save, and another number of them goes on."""

import os
import re
import shlex
import sys

import pytest

from tests import processes

TAKES = 20  # seconds
LAUNCH = processes.ROOT / "launch"


def preempted(start, folder, whom="launcher", number="SIGTERM"):
    """Runs the program under a launcher, whose process number the ranks know."""
    command = processes.program("preempted", str(folder), whom, number)
    line = shlex.join([*start, "--", *command])
    shell = ["bash", "-c", f"export LAUNCHER=$$; exec {line}"]
    return processes.run([("", shell, {})], takes=TAKES)


def mpi(size):
    return [str(LAUNCH / "mpi.sh"), "-np", str(size), "--oversubscribe"]


def multiworker(size):
    return [sys.executable, str(LAUNCH / "multiworker.py"), "--workers", str(size)]


@pytest.mark.parametrize(
    ("start", "number", "other", "later"),
    [
        (mpi, "SIGTERM", mpi, 3),
        (multiworker, "SIGTERM", mpi, 1),
    ],
    ids=["mpi, 2 and 3", "multiworker of 2, and 1 process"],
)
def test_a_launcher_that_is_told_to_end_lets_the_ranks_save(start, number, other, later, tmp_path):
    folder = tmp_path / "checkpoints"
    finished = preempted(start(2), folder, number=number)
    assert finished.code == os.EX_TEMPFAIL, finished.output
    assert "begins with 2" in finished.output, finished.output
    # In the middle of an epoch, unless the signal has taken long.
    assert re.search(r"saved epoch [23], after \d", finished.output), finished.output
    assert "the same weights" not in finished.output, finished.output
    (kept,) = folder.iterdir()
    assert kept.name.startswith("checkpoint-")
    finished = preempted(other(later), folder)
    assert finished.code == 0, finished.output
    assert finished.output.count(f"goes on with {later}\n") == later, finished.output
    assert finished.output.count("the same weights") == later, finished.output
