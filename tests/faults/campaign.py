"""What goes wrong on one rank, and what then has to become of the job."""

import json
import re
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from syncbn._src.watchdog import messages
from tests import processes

LAUNCH = processes.ROOT / "launch"
WARN, END = 4, 12
"""Seconds that a rank waits until it says so, and until the job ends."""
LAUNCHERS = {
    "mpi": ("mpi", [str(LAUNCH / "mpi.sh"), "--oversubscribe", "-np"]),
    "horovod-gloo": ("horovod", [str(LAUNCH / "horovod.sh"), "--gloo", "-np"]),
    "horovod-mpi": ("horovod", [str(LAUNCH / "horovod.sh"), "--mpi", "-np"]),
    "multiworker": (
        "multiworker",
        [sys.executable, str(LAUNCH / "multiworker.py"), "--workers"],
    ),
}
"""By launcher: the engine, and a command that takes the number of ranks next."""

_RANK = r"rank {rank} (\(process \d+ on \S+\) )?"
_WAITS = r"rank \d has waited \d+ s in \S*syncbn/\w+/\w+ \(call \d+\); (.*; )?" + _RANK
SAYS = {
    "none": None,
    "is NaN": None,
    "is slow": None,
    "starts late": None,
    "raises": "ValueError: the fault",
    "pipeline raises": "ValueError: the fault",
    "callback raises": "ValueError: the fault",
    "disk is full": "A checkpoint must be written to",
    "out of memory": "(OOM|ResourceExhausted|bad_alloc|allocat)",
    "ends": _RANK + r"has ended.*ran out of batches, syncbn\.training\.join",
    "exits with 3": _RANK + r"has ended|Process name: {rank}\nExit code: 3\n",
    "is killed": "(signal 9|SIGKILL|Exit code: 137|is gone without a word)",
    "is stopped": _WAITS + "has not answered",
    "is stopped for 8 s": _WAITS + "has not answered",
    "sleeps": _WAITS + "is in no collective",
    "never begins": r"has waited \d+ s for all ranks to start|Timeout \(0:00:14\)!",
    "other order": "(second|first)/statistics",
    "other order eagerly": "(second|first)/statistics",
    "skips one": "(second|first)/(statistics|gradient)",
    "other channels": "(six|first)/statistics",
    "other dtype": "float64/statistics",
}
"""By fault: what somebody says, by a pattern; ``None`` where the job goes on, and ends well."""
CODES = {
    **dict.fromkeys(("raises", "pipeline raises", "callback raises", "disk is full"), (1,)),
    "exits with 3": (3,),
    "is killed": (128 + signal.SIGKILL,),
    "sleeps": (messages.EXIT_CODE,),
}
"""By fault: what the job may end with, besides the code of the watchdog, if that was faster.

Others make a rank fail by an error, which is 1.
"""
GO_ON = ("is stopped for 8 s",)
"""Faults that are spoken of, and survived all the same."""


class Case(NamedTuple):
    """A fault of one of the ranks."""

    fault: str
    rank: int = 1
    size: int = 2

    def __str__(self):
        return f"{self.fault}, rank {self.rank} of {self.size}"

    @property
    def says(self):
        """The pattern of what somebody says, or ``None``."""
        pattern = SAYS[self.fault]
        return None if pattern is None else pattern.replace("{rank}", str(self.rank))

    @property
    def goes_on(self):
        """Whether the job survives."""
        return self.says is None or self.fault in GO_ON


# The store of the watchdog, and checkpoints, are rank 0's.
_OF_RANK_0 = (
    *("raises", "callback raises", "ends", "exits with 3", "is killed", "is stopped", "sleeps"),
    "never begins",
)
_OF_THREE = ("raises", "ends", "is killed", "is stopped", "other order", "skips one")
CASES = [
    *(Case(fault) for fault in SAYS if fault != "disk is full"),
    *(Case(fault, rank=0) for fault in ("disk is full", *_OF_RANK_0)),
    *(Case(fault, size=3) for fault in _OF_THREE),
]


class Outcome(NamedTuple):
    """What has become of a job."""

    code: int
    seconds: float
    output: str
    left: list[str]
    """The processes that have outlived it."""
    checkpoints: list[str]
    """What is wrong with the checkpoints that are left."""
    launcher: str

    def says(self, case):
        """The line that speaks of the fault, or nothing."""
        found = re.search(case.says, self.output) if case.says else None
        if found is None:
            return ""
        begin = self.output.rfind("\n", 0, found.start())
        end = self.output.find("\n", found.end())
        return self.output[begin + 1 : end].strip()


def run(launcher, case, folder):
    """Runs a job with a fault; its records and checkpoints go into ``folder``."""
    engine, command = LAUNCHERS[launcher]
    mark = f"faulty-{uuid.uuid4().hex}"
    program = processes.program(
        "faulty_loop", engine, case.fault, str(case.rank), str(folder), mark
    )
    limit = ["--timeout", str(30 if case.fault in GO_ON else END)]
    env = {"SYNCBN_WARN_SECONDS": str(WARN), "SYNCBN_RECORDS": str(folder)}
    started = time.monotonic()
    finished = processes.run(
        [(launcher, [*command, str(case.size), *limit, "--", *program], env)], takes=20
    )
    seconds = time.monotonic() - started
    # Open MPI puts its marks into lines that Python writes in pieces.
    output = re.sub(r"\[\d+,\d+\]<std\w+>:", "", finished.output)
    left, checkpoints = processes.left(mark), _checkpoints(case, folder)
    return Outcome(finished.code, seconds, output, left, checkpoints, launcher)


def _checkpoints(case, folder):
    """What is wrong with the checkpoint from before the fault, where it is one of `fit`."""
    if case.fault not in ("callback raises", "disk is full"):
        return []
    (latest, *others) = [*Path(folder, "checkpoints").glob("checkpoint-*")] or [Path("none")]
    try:
        progress = json.loads((latest / "progress.json").read_text())
        reader = tf.train.load_checkpoint(str(latest / "variables"))
        sizes = [np.size(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()]
    except (OSError, ValueError, tf.errors.OpError) as error:
        return [f"no checkpoint: {error}"]
    # One epoch; a kernel, a bias, and what the normalization has; and what the optimizer keeps.
    whole = not others and progress["epoch"] == 1 and sum(sizes) >= 4 * 4 + 4 + 4 * 4
    return [] if whole else [f"a checkpoint of {progress} and {sizes}, besides {others}"]


def wrong_with(case, outcome):
    """Returns in words what is wrong with an outcome; nothing where it is what was promised."""
    if outcome.code == 124:
        return "it was ended by the limit of the test"
    if outcome.left:
        return f"{len(outcome.left)} processes are left"
    if outcome.checkpoints:
        return outcome.checkpoints[0]
    done = re.findall(r"rank \d is done: (.*)", outcome.output)
    if case.goes_on:
        alike = len(set(done)) == 1 or case.fault == "is NaN"
        well = outcome.code == 0 and len(done) == case.size and alike
        return "" if well else "it did not go on"
    if outcome.code == 0 or done:
        return "it ended as if nothing had happened"
    codes = CODES.get(case.fault, (1,))
    if (case.fault, outcome.launcher) == ("exits with 3", "horovod-gloo"):
        # It shuts Horovod down, and the error that another one gets may end that one first.
        codes += (1,)
    if outcome.code not in (*codes, messages.EXIT_CODE):
        return f"its code is {outcome.code}, and none of {codes}"
    return "" if outcome.says(case) else f"nobody said {case.says}"
