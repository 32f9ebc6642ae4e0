"""Jobs of mpirun or horovodrun that get a launcher's signals, and whose ranks have time to save.

SIGTERM goes to the ranks on this machine, which have two minutes to end by themselves: told to end,
Open MPI's mpirun would leave them one second, and horovodrun five. So much is left to the others
once a rank has exited with another code than 0. Where processes of ranks catch SIGTERM, only those
get it, and a shell around them lives on.
After that, after another SIGTERM, or where there are no ranks here, it goes to the process group of
mpirun or horovodrun, a session of its own. In an elastic job, where others would go on without it,
it does so once one of these ranks has ended. Other signals go there at once. In such a job that
group is killed 15 seconds after it has been told to end. Should the launcher be killed, the job is
told to end.

rank_lines.py and first_failure.py start jobs so. Any python3 may come first on a PATH, so this
keeps to what Python 3.6 has.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from typing import Sequence  # noqa: UP035  (Python 3.6 has no other)

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)
SAVE = 120.0
"""Seconds that ranks get to end by themselves after SIGTERM."""
TOGETHER = 1.0
"""Seconds after SIGTERM in which another one is the same, from somebody else."""
KILL = 15.0
"""Seconds after which horovodrun is killed in an elastic job. Told to end, it ends the ranks within
ten, but waits for others in their place until --elastic-timeout, where one had ended before."""
LOOK = 0.1
"""Seconds between looks at whether a rank has ended."""
SHELLS = ("ash", "bash", "dash", "fish", "ksh", "sh", "zsh")


class LaunchedJob:
    """A command that starts ranks; signals of this process are for it from now on.

    Args:
        command: The command.
        variables: Names of variables that the environment of each rank has, and of nobody else.
        elastic: Whether the job goes on where a rank ends, and after SIGTERM must not.

    Attributes:
        process: The command's process, with pipes for what it writes.
        passed_on: The signals that its group has been sent.
    """

    def __init__(
        self, command: Sequence[str], variables: Sequence[str], elastic: bool = False
    ) -> None:
        self._rank = re.compile(r"(^|\0)({})=".format("|".join(variables)).encode())
        self._elastic = elastic
        self._told: float | None = None  # when ranks were
        self.passed_on: list[int] = []
        prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1
        self.process = subprocess.Popen(  # noqa: S603  (the user's own command, and no shell)
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A launcher may be started by a rank, such as a task of srun; with these the command
            # would be a rank itself.
            env={k: v for k, v in os.environ.items() if k not in variables},
            # A terminal's signals come here only, and so to the command once.
            start_new_session=True,
            preexec_fn=lambda: prctl(set_parent_death_signal, signal.SIGTERM),
        )
        for number in FORWARDED:
            signal.signal(number, self._tell_ranks if number == signal.SIGTERM else self._pass_on)

    def _send(self, number: int) -> bool:
        """Sends a signal to the command's group, and returns whether anybody is there."""
        self.passed_on.append(number)
        self.process.poll()  # or it would be there for as long as nobody asks for its code
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _pass_on(self, number: int, _: object = None) -> None:
        """Sends a signal to the command's group, or ends where nobody is there."""
        if not self._send(number):  # and nobody may be reading its last words
            end_by(number)
        elif number in ENDING:
            self._kill_late_if_elastic()

    def end(self) -> None:
        """Tells the command's group to end."""
        self._send(signal.SIGTERM)
        self._kill_late_if_elastic()

    def ranks_here(self, family: "dict[int, list[int]]") -> "list[int]":
        """Returns the ranks on this machine, without what they have started.

        By descent: ranks are in the session of Open MPI's mpirun, but in sessions of their own
        under MPICH and Horovod.

        Args:
            family: `children`.
        """
        found, started = [], list(family.get(os.getpid(), []))
        while started:
            process = started.pop()
            with contextlib.suppress(OSError), open(f"/proc/{process}/environ", "rb") as file:
                if self._rank.search(file.read()):
                    found.append(process)
                    continue
            started += family.get(process, [])
        return found

    def _tell_ranks(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self._told is not None:
            if now > self._told + TOGETHER:
                self._pass_on(number)
            return
        self._told = now
        family = children()
        ranks = self.ranks_here(family)
        if not ranks:
            self._pass_on(number)
            return
        for rank in ranks:
            signal_family(rank, family, number)
        threading.Thread(target=self._send_late, args=[ranks, number], daemon=True).start()

    def _send_late(self, ranks: "list[int]", number: int) -> None:
        late = time.monotonic() + SAVE
        while time.monotonic() < late and not (self._elastic and any(map(has_ended, ranks))):
            time.sleep(LOOK)
        self._send(number)
        if self._elastic:
            self._kill_late()

    def _kill_late_if_elastic(self) -> None:
        if self._elastic:
            threading.Thread(target=self._kill_late, daemon=True).start()

    def _kill_late(self) -> None:
        time.sleep(KILL)
        self._send(signal.SIGKILL)


def end_as(code: int) -> int:
    """Returns an exit code, as `subprocess.Popen` has it, or ends as the signal did that it has."""
    if code < 0:
        end_by(-code)
    return code


def end_by(number: int) -> None:
    """Ends this process by a signal."""
    if signal.getsignal(number) != signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def has_ended(process: int) -> bool:
    """Returns whether a process has ended, also where nobody has asked for its code yet."""
    try:
        return _status(process, "State") in "ZX"
    except OSError:
        return True


def children() -> "dict[int, list[int]]":
    """Returns the processes of this machine by their parents."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.setdefault(int(_status(int(name), "PPid")), []).append(int(name))
    return found


def signal_family(process: int, family: "dict[int, list[int]]", number: int) -> None:
    """Sends a signal for a process: to itself, or to what a shell has started.

    The signal would end a shell around a training script, and with the shell the job. So it is for
    what catches it there; where nothing does, for the shell and for what it has started. It is
    never for the helpers of a script.

    Args:
        process: The process.
        family: `children`.
        number: The signal.
    """
    found, all_of_them, started = [], [], [process]
    while started:
        one = started.pop()
        with contextlib.suppress(OSError):  # it has ended meanwhile
            catches = int(_status(one, "SigCgt"), 16) >> (number - 1) & 1
            all_of_them.append(one)
            if catches:
                found.append(one)
            elif _status(one, "Name") in SHELLS:
                started += family.get(one, [])
    for one in found or all_of_them:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)


def _status(process: int, name: str) -> str:
    with open(f"/proc/{process}/status", errors="replace") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{name}:"))
