"""Starting processes that are ended in any case."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from syncbn._src.bundled.launch.process_groups import end

_TERMINATE = 5.0
"""Seconds that processes get to end when told to; launchers pass that on to others."""


class Command(NamedTuple):
    """A process to start, and what to add to its environment."""

    arguments: Sequence[str]
    environment: dict[str, str]


# Empty lines, and what TensorFlow logs before it can be silenced; launchers prefix the rank.
_NOISE = re.compile(r"(\[.*?\](<\w+>)?:? ?)?\s*((WARNING: All log|[IW]\d{4} ).*)?")


def run(commands: Sequence[Command], limit: float) -> tuple[str, str]:
    """Runs commands in parallel until all have ended, one has failed, or the limit is reached.

    None of their processes is left running.

    Returns:
        What went wrong, in words, or nothing; and the last lines that they printed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signals())
        running = []
        for command in commands:
            log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(  # noqa: S603  (no shell, no foreign input)
                command.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(command.environment),
                start_new_session=True,
            )
            stack.callback(end, [process], _TERMINATE)
            running.append((process, log))
        deadline = time.monotonic() + limit
        reason = ""
        while not reason and any(process.poll() is None for process, _ in running):
            time.sleep(0.05)
            if time.monotonic() > deadline:
                reason = f"no end within {limit:g} s"
            elif any(process.poll() for process, _ in running):
                break
        failed = [process for process, _ in running if process.poll()]
        end([process for process, _ in running], _TERMINATE)
        lines = []
        for process, log in running:
            log.seek(0)
            if process in failed or not failed:
                lines += [line for line in log.read().splitlines() if not _NOISE.fullmatch(line)]
    if failed:
        reason = _reason(lines) or f"exit code {failed[0].returncode}"
    return reason, "\n".join(lines[-20:])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Makes signals that would end this process run its ``finally`` blocks first."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: sys.exit(128 + number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(changes: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
    return {
        **quiet,
        **kept,
        **root_permission(),
        "CUDA_VISIBLE_DEVICES": "-1",
        "PATH": program_path(),
        **changes,
    }


def root_permission() -> dict[str, str]:
    """Returns the variables that Open MPI requires of root, for what is short and does no harm."""
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    return dict.fromkeys(names, "1") if os.geteuid() == 0 else {}


def root_needs() -> str:
    """Returns what root still has to set for Open MPI, or an empty string."""
    return " and ".join(f"{name}=1" for name in root_permission() if name not in os.environ)


def _reason(lines: Sequence[str]) -> str:
    """Returns the first Python error, which causes the others, or an empty string."""
    errors = (re.search(r"\b\w+(Error|Exception): .*", line) for line in lines)
    return next((error.group() for error in errors if error), "")


def program_path() -> str:
    """Returns the PATH, with this Python's programs first, even if it is not activated."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
