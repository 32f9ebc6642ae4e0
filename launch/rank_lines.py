#!/usr/bin/env python3
"""Run mpirun, and mark each whole line of its output once, with the rank that wrote it.

usage: launch/rank_lines.py TAG MPIRUN...

mpi.sh and horovod.sh --mpi start mpirun through this. What a rank writes reaches mpirun in pieces,
which need not end where lines do. mpirun tags each piece with its rank, and forwards those of
several ranks as they come, so that tags stand between words, and one line within another. Here
pieces are put together again: each line is printed once it has ended, as `[RANK] line`. What mpirun
itself says is left unmarked. multiworker.py marks the lines of its workers by the same classes.
Each of these has a stream of its own, without tags.

A line that has not ended after a second is printed as far as it is there: a question, or dots. What
follows continues it, or is a line of its own, marked again, where something else has been printed
since. A line that is written again and again after carriage returns, as by a progress bar, is
printed as it stands, once a second at most, and as it is in the end.

TAG is the regular expression of a tag, which begins with [ or the control character 1e; its group
is the rank. MPIRUN may be a command that starts mpirun. Signals go on to the ranks and to it, as
rank_signals.py says. The end is the command's, by exit code or by signal; where its output cannot
be passed on, it is ended, and the exit code is 1.

Any python3 may come first on a PATH, so this keeps to what Python 3.6 has.
"""

import ctypes
import os
import re
import select
import subprocess
import sys
import threading
import time
from typing import IO, Callable, Pattern  # noqa: UP035  (Python 3.6 has no others)

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

import rank_signals

RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""What the environment of a rank has, under Open MPI and MPICH."""
PATIENCE = 1.0
"""Seconds after which what has come of a line is printed, finished or not."""
AFTERWARDS = 5.0
"""Seconds to wait for output after the end of mpirun, which somebody else may keep open."""
AT_ONCE = 0.01
"""Seconds in which a text is written where somebody takes it."""
LOOK = 0.5
"""Seconds between looks at whether mpirun has ended, where nothing comes."""

ENDED = re.compile(rb"[^\n]*\n|[^\n]+")
WRITTEN_OVER = re.compile(rb"\r+(?=[^\r\n])")
PERHAPS_A_TAG = re.compile(rb"[\[\x1e][^\r\n]*\Z")
LONGEST_TAG = 300
NO_TAG = re.compile(rb"(?!)")
"""Of a stream that is one rank's alone."""


class Line:
    """What has come of a line and is not printed yet."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.state = b""  # what `text` is written over
        self.since = 0.0  # when the first of these came
        self.begun = False  # whether a beginning is printed


class Lines:
    """Puts the pieces of one stream together.

    Args:
        tag: That before each piece of a rank.
        write: Is given a rank (b"" for mpirun), a text, and whether it continues the rank's last.
        untagged: Whose text without a tag is.
    """

    def __init__(
        self,
        tag: Pattern[bytes],
        write: Callable[[bytes, bytes, bool], None],
        untagged: bytes = b"",
    ) -> None:
        self._tag = tag
        self._write = write
        self._untagged = untagged
        self._lines: dict[bytes, Line] = {}  # by rank
        self._rank = untagged
        self._held = b""  # the beginning of a tag, perhaps
        self._came = 0.0

    def add(self, data: bytes, now: float) -> None:
        """Takes what has come, and writes the lines that have ended."""
        data = self._held + data
        self._came = now
        start = 0
        for found in self._tag.finditer(data):
            self._add_text(data[start : found.start()], now)
            self._end(self._untagged)  # mpirun's own words, had they no newline
            self._rank, start = found.group(1), found.end()
        held = PERHAPS_A_TAG.search(data, max(start, len(data) - LONGEST_TAG))
        end = held.start() if held else len(data)
        self._held = data[end:]
        self._add_text(data[start:end], now)

    def write_late(self, now: float) -> None:
        """Writes what has waited for `PATIENCE`, as far as it is there."""
        if self._held and now >= self._came + PATIENCE:
            self._release()
        for rank, line in self._lines.items():
            if now < line.since + PATIENCE:
                continue
            line.since = now
            if line.state:
                self._write(rank, line.state + b"\n", False)
                line.state = b""
                continue
            text = bytes(line.text).rstrip(b"\r")  # which may be half of an end
            if text:
                del line.text[: len(text)]
                self._write(rank, text, line.begun)
                line.begun = True

    def due(self) -> float:
        """Returns when there will be something for `write_late`."""
        lines = self._lines.values()
        waiting = [line.since for line in lines if line.state or line.text.rstrip(b"\r")]
        if self._held:
            waiting.append(self._came)
        return min(waiting, default=float("inf")) + PATIENCE

    def close(self) -> None:
        """Writes what is left."""
        self._release()
        for rank in list(self._lines):
            self._end(rank)

    def _release(self) -> None:
        held, self._held = self._held, b""
        self._add_text(held, self._came)

    def _add_text(self, text: bytes, now: float) -> None:
        for part in ENDED.findall(text):
            self._add_part(part, now)
            if part.endswith(b"\n"):
                self._end(self._rank)
                self._rank = self._untagged  # until the next tag

    def _add_part(self, part: bytes, now: float) -> None:
        line = self._lines.setdefault(self._rank, Line())
        if not line.text.rstrip(b"\r") and not line.state:
            line.since = now
        new = max(len(line.text) - 1, 0)
        line.text += part
        if not WRITTEN_OVER.search(line.text, new):
            return
        *states, text = WRITTEN_OVER.split(bytes(line.text))
        if line.begun:
            self._write(self._rank, states.pop(0) + b"\n", True)
            line.begun = False
        for state in states:
            line.state = state.rstrip(b"\b") or line.state
        line.text = bytearray(text)

    def _end(self, rank: bytes) -> None:
        line = self._lines.pop(rank, None)
        if line is None:
            return
        text = bytes(line.text)
        if not text.endswith(b"\n"):  # nor will it
            text = text.rstrip(b"\r") or line.state
            if not text and not line.begun:
                return
            text += b"\n"
        self._write(rank, text, line.begun)


class Target:
    """A file that lines of one or two streams go to."""

    def __init__(self) -> None:
        self._unfinished: object = None  # whose line is the last in the file
        self._lock = threading.Lock()

    def write(self, descriptor: int, rank: bytes, text: bytes, continues: bool) -> None:
        """Writes a text with a mark, or without, where it continues the last line in the file."""
        with self._lock:
            if not (continues and self._unfinished == (descriptor, rank)):
                if continues and not text.strip():
                    return
                before = b"\n" if self._unfinished else b""
                text = before + (b"[%s] " % rank if rank else b"") + text
            self._unfinished = None if text.endswith(b"\n") else (descriptor, rank)
            write_lines(descriptor, text)


class Copier(threading.Thread):
    """Copies a stream's lines, until there are no more or nobody reads them.

    Args:
        source: What mpirun prints, or a rank.
        target: What the lines go to, and by which descriptor.
        descriptor: See ``target``.
        tag: That before each piece of a rank.
        fail: Is told why output is lost, if any is.
        untagged: Whose text without a tag is: mpirun's, or that of a rank.

    Attributes:
        ended: To be set once mpirun, or the rank, has ended.
    """

    def __init__(
        self,
        source: IO[bytes],
        target: Target,
        descriptor: int,
        tag: Pattern[bytes],
        fail: Callable[[str], None],
        untagged: bytes = b"",
    ) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self._fail = fail
        self._source, self._target, self._descriptor = source, target, descriptor
        self._lines = Lines(tag, self._write, untagged)
        self._writing = 0.0

    def run(self) -> None:
        """Copies."""
        with self._source:  # whose end mpirun then sees as if it had written there itself
            try:
                self._copy()
            except BrokenPipeError:
                return
            except Exception as error:  # whatever it is
                self._fail(f"{type(error).__name__}: {error}")

    def _copy(self) -> None:
        deadline = float("inf")
        while self._now() < deadline:
            timeout = min(max(self._lines.due() - self._now(), 0), LOOK)
            readable, _, _ = select.select([self._source], [], [], timeout)
            if self.ended.is_set():
                deadline = min(deadline, self._now() + AFTERWARDS)
            if readable:
                data = os.read(self._source.fileno(), 1 << 16)
                if not data:
                    break
                self._lines.add(data, self._now())
            self._lines.write_late(self._now())
        self._lines.close()

    def _now(self) -> float:
        # Without the time in which nobody took what was written: what came then has not been read.
        return time.monotonic() - self._writing

    def _write(self, rank: bytes, text: bytes, continues: bool) -> None:
        start = time.monotonic()
        self._target.write(self._descriptor, rank, text, continues)
        seconds = time.monotonic() - start
        # Or a helper of a rank that prints without end would keep the launcher for ever.
        if seconds > AT_ONCE:
            self._writing += seconds


def write_lines(descriptor: int, text: bytes) -> None:
    """Writes a text in pieces that nobody else's come between in a pipe, at ends of lines if any.

    Also where the file is one that others have told not to wait.
    """
    while text:
        piece = text[: select.PIPE_BUF]
        piece = piece[: piece.rfind(b"\n") + 1] or piece
        try:
            text = text[os.write(descriptor, piece) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def job_code(job: "subprocess.Popen[bytes]", passed_on: "list[int]") -> int:
    """Waits for the end, and returns the exit code, as Popen has it.

    A signal may end the shell that has started mpirun, and mpirun pass it on to ranks, which go on.
    mpirun is a child of this process then.
    """
    code = job.wait()
    while -code in passed_on:
        try:
            _, status = os.waitpid(-job.pid, 0)
        except ChildProcessError:  # no other in its group
            break
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code


def usage(text: "str | None") -> int:
    """Prints how a script is used, and returns the exit code: 2 where nobody has asked for it."""
    asked = sys.argv[1:] in (["-h"], ["--help"])
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def main() -> int:
    """Runs mpirun, and ends as it does."""
    if len(sys.argv) < 3:
        return usage(__doc__)
    tag, *command = sys.argv[1:]
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(set_child_subreaper, 1)  # for `job_code`
    job = rank_signals.LaunchedJob(command, RANK)
    failures = []

    def fail(message: str) -> None:
        failures.append(message)
        job.end()
        print(f"rank_lines.py: output could not be passed on: {message}", file=sys.stderr)

    output = Target()
    errors = output if os.path.sameopenfile(1, 2) else Target()
    copiers = [
        Copier(source, target, descriptor, re.compile(tag.encode()), fail)
        for source, target, descriptor in (
            (job.process.stdout, output, 1),
            (job.process.stderr, errors, 2),
        )
    ]
    for copier in copiers:
        copier.start()
    code = job_code(job.process, job.passed_on)
    for copier in copiers:
        copier.ended.set()
    for copier in copiers:
        copier.join()
    return 1 if failures else rank_signals.end_as(code)


if __name__ == "__main__":
    sys.exit(main())
