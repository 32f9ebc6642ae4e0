"""Ending process groups, and addresses for the workers of a cluster. No TensorFlow."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence


def ended(process: subprocess.Popen) -> tuple[int, str] | None:
    """Returns the exit code of a process and how it ended, or None while it runs.

    128 + n is the code where signal n ended it. The process is not reaped, so that its group stays
    its own and can be signalled.
    """
    if process.returncode is None:
        state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        code = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
    else:  # somebody has reaped it
        code = process.returncode
    if code >= 0:
        return code, f"exited with code {code}"
    return 128 - code, f"was ended by {signal.Signals(-code).name}"


def settle(
    processes: Sequence[subprocess.Popen],
    seconds: float,
    cut_short: Callable[[], bool] = lambda: False,
) -> None:
    """Waits until all processes have ended, ``seconds`` are over, or it is cut short."""
    deadline = time.monotonic() + seconds
    while (
        not cut_short()
        and time.monotonic() < deadline
        and any(ended(process) is None for process in processes)
    ):
        time.sleep(0.05)


def end(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    """Ends processes that lead groups, and the other processes of these groups.

    Args:
        processes: The leaders. Launchers pass the signal on to what they have started elsewhere.
        seconds: How long they may take to end by themselves, once told to.
    """
    signal_groups(processes, signal.SIGTERM)
    settle(processes, seconds)
    signal_groups(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def signal_groups(processes: Sequence[subprocess.Popen], number: int) -> None:
    """Sends a signal to the groups that processes lead."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # reaped before, and its group is empty
            os.killpg(process.pid, number)


# Not those that the system hands out by itself (on Linux from 32768 on): a worker takes its port
# only once it has imported TensorFlow, and another job's connection may have been given it by then.
_PORTS = range(10000, 32768)


def free_addresses(number: int) -> list[str]:
    """Returns ``number`` addresses of this machine with ports that are free now."""
    addresses: list[str] = []
    with contextlib.ExitStack() as stack:
        while len(addresses) < number:
            one = stack.enter_context(socket.socket())
            port = secrets.choice(_PORTS)
            with contextlib.suppress(OSError):  # somebody has it
                one.bind(("127.0.0.1", port))
                addresses.append(f"127.0.0.1:{port}")
    return addresses
