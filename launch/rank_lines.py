#!/usr/bin/env python3
"""Run mpirun, and mark each whole line of its output once, with the rank that wrote it.

usage: launch/rank_lines.py TAG MPIRUN...

mpi.sh starts mpirun through this. What a rank writes reaches mpirun in pieces, which need not end
where lines do. mpirun tags each piece with its rank, and forwards those of several ranks as they
come, so that tags stand between words, and one line within another. Here pieces are put together
again: each line is printed once it has ended, as `[RANK] line`. What mpirun itself says is left
unmarked.

TAG is the regular expression of a tag; its group is the rank. Signals go to mpirun, in a session of
its own, once; the end is mpirun's, by exit code or by signal. Should this process be killed, mpirun
ends with it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import IO

FORWARDED = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
AFTERWARDS = 5.0
"""Seconds for output after the end of mpirun, which somebody else may keep open."""


def whole_lines(pieces: Iterable[bytes], tag: re.Pattern[bytes]) -> Iterator[bytes]:
    """Yields lines, each with a mark of its rank.

    Args:
        pieces: What mpirun prints, up to a newline or the end: pieces of several ranks, with tags.
        tag: That before each piece of a rank.
    """
    begun: defaultdict[bytes, bytes] = defaultdict(bytes)  # by rank
    for piece in pieces:
        own, *tagged = tag.split(piece)
        if own:
            yield own if own.endswith(b"\n") else own + b"\n"
        for rank, text in zip(tagged[::2], tagged[1::2], strict=True):
            begun[rank] += text
            if text.endswith(b"\n"):
                yield b"[%s] %s" % (rank, begun.pop(rank))
    for rank, text in begun.items():
        yield b"[%s] %s\n" % (rank, text)


def copy(source: IO[bytes], target: int, tag: re.Pattern[bytes]) -> None:
    """Copies lines to a file descriptor, until there are no more or nobody reads them."""
    with source:  # whose end mpirun then sees as if it had written there itself
        try:
            for line in whole_lines(source, tag):
                while line:
                    line = line[os.write(target, line) :]
        except BrokenPipeError:
            return


def main() -> int:
    """Runs mpirun, and ends as it does."""
    tag, *command = sys.argv[1:]
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1
    job = subprocess.Popen(  # noqa: S603  (the user's own command, and no shell)
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A terminal's signals come here only, and so to mpirun once.
        start_new_session=True,
        preexec_fn=lambda: prctl(set_parent_death_signal, signal.SIGTERM),
    )
    for number in FORWARDED:
        signal.signal(number, lambda number, _: job.send_signal(number))
    copiers = [
        threading.Thread(target=copy, args=(source, target, re.compile(tag.encode())), daemon=True)
        for source, target in ((job.stdout, 1), (job.stderr, 2))
    ]
    for copier in copiers:
        copier.start()
    code = job.wait()
    for copier in copiers:
        copier.join(AFTERWARDS)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
