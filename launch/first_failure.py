#!/usr/bin/env python3
"""Run horovodrun over Gloo, and end with the exit code of the rank that failed first.

usage: launch/first_failure.py [--elastic] HOROVODRUN...

horovod.sh starts horovodrun through this, which itself exits with 1 whatever its ranks have exited
with. Its last words on stderr name the one that ended first, and its code, also for ranks of other
machines: 128 + n where signal n has ended it, and 143 where horovodrun has, since it was told to
end. What a rank writes cannot be taken for that, since Horovod marks its lines. Of an elastic job
this is about the workers that it had at its end; one that was lost or removed before is not. Where
horovodrun exits with 0, or does not say which rank has failed, the end is its own, by exit code or
by signal. A rank has ended, for horovodrun, once its output has: with the last process that holds
it, such as a helper that a rank leaves behind.

Signals go on to the ranks and to horovodrun, as rank_signals.py says, with --elastic in such a job.
stdout and stderr are passed on as they come, in whole lines as far as they have come and a pipe
takes them at once. Where one of them cannot be passed on, horovodrun would hang or lose it in
silence; so the job is ended, and the exit code is 1.

Any python3 may come first on a PATH, so this keeps to what Python 3.6 has.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
from typing import IO, Callable  # noqa: UP035  (Python 3.6 has no others)

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

import rank_lines
import rank_signals

FAILED = re.compile(
    rb"The first process to do so was:\nProcess name: [^\n]*\nExit code: (-?[0-9]+)\n"
)
"""What horovodrun says at its end, with the code of a rank."""
LONGEST = 4096
"""Bytes that `FAILED` may take."""
PIPE = 1 << 20
"""Bytes that a pipe holds at most, on all systems."""
LOOK = 0.2
"""Seconds between looks at whether horovodrun has ended, where somebody keeps its output open."""


def pass_on_output(
    process: "subprocess.Popen[bytes]",
    source: "IO[bytes]",
    descriptor: int,
    fail: Callable[[OSError], None],
) -> "int | None":
    """Writes to a descriptor what comes from a process until its end.

    Args:
        process: The process.
        source: Its output.
        descriptor: What the output goes to.
        fail: Is told why the output cannot be written, where it cannot.

    Returns:
        The code of the rank that failed first, or ``None``.
    """
    code, said, over, lost = None, b"", False, False
    while not over:
        over = process.poll() is not None  # and all that it has said is in the pipe
        readable, _, _ = select.select([source], [], [], 0 if over else LOOK)
        if not readable:
            continue
        data = os.read(source.fileno(), PIPE)
        if not data:
            break
        said = said[-LONGEST:] + data
        for found in FAILED.finditer(said):
            code = int(found.group(1))
        if not lost:
            try:
                rank_lines.write_lines(descriptor, data)
            except OSError as error:
                lost = True  # and read on, since horovodrun has a traceback for each line otherwise
                fail(error)
    return code


def main() -> int:
    """Runs horovodrun."""
    elastic = sys.argv[1:2] == ["--elastic"]
    command = sys.argv[2 if elastic else 1 :]
    if command[:1] in ([], ["-h"], ["--help"]):
        return rank_lines.usage(__doc__)
    job = rank_signals.LaunchedJob(command, ("HOROVOD_RANK",), elastic)
    failures = []

    def fail(error: OSError) -> None:
        failures.append(error)
        job.end()
        with contextlib.suppress(OSError):
            print(f"first_failure.py: output could not be passed on: {error}", file=sys.stderr)

    output = threading.Thread(
        target=pass_on_output, args=(job.process, job.process.stdout, 1, fail), daemon=True
    )
    output.start()
    failed = pass_on_output(job.process, job.process.stderr, 2, fail)
    code = job.process.wait()
    output.join()
    if failures:
        return 1
    if code == -signal.SIGKILL and signal.SIGKILL in job.passed_on:  # after SIGTERM
        code = -signal.SIGTERM
    if code <= 0 or failed is None:
        return rank_signals.end_as(code)
    return failed if failed > 0 else 128 - failed


if __name__ == "__main__":
    sys.exit(main())
