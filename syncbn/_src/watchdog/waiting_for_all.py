"""The waits for all ranks that come before the watchdog: it starts with their first call."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from syncbn._src.watchdog.messages import EXIT_CODE, tell_user
from syncbn._src.watchdog.waiting_limits import is_on, limits


@contextlib.contextmanager
def within_limits(what: str, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """Ends the job where what is done within, which waits for all ranks, takes too long.

    No rank knows anything of the others yet, so it cannot be said who is missing. The limits are
    this process's own.

    Args:
        what: What all ranks have to do, and at least one has not done.
        end: Ends this process, and with it the job, with a code.
    """
    come = threading.Event()
    begin = time.monotonic()

    def told() -> str:
        seconds = time.monotonic() - begin
        where = f"process {os.getpid()} on {socket.gethostname()}"
        return f"{where} has waited {seconds:.0f} s for all ranks to {what}"

    def wait() -> None:
        try:
            warn, last = limits()
        except ValueError:  # rank 0 tells all
            return
        if _is_set(come, min(warn, last)):
            return
        if warn < last:
            tell_user(f"{told()}; at least one has not")
        if not _is_set(come, last - warn if warn < last else 0):
            tell_user(f"{told()}, the limit of {last:g} s. The job ends")
            sys.stdout.flush()
            end(EXIT_CODE)

    if is_on():
        threading.Thread(target=wait, name="syncbn-waiting-for-all", daemon=True).start()
    try:
        yield
    finally:
        come.set()


@contextlib.contextmanager
def starting_within_limits() -> Iterator[None]:
    """The same for the start of an engine, which may keep all other threads from running.

    MPI and the cluster of tf.distribute hold Python's global lock while they wait for all
    processes. Then the process ends a second later, with its stack for a message.
    """
    try:
        last = limits().end
    except ValueError:  # said once the watchdog starts
        last = float("inf")
    with within_limits("start"):
        if is_on() and last < float("inf"):
            faulthandler.dump_traceback_later(last + 1, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _is_set(event: threading.Event, seconds: float) -> bool:
    # Threads wait for ever only where they are given no number.
    return event.wait(None if seconds == float("inf") else seconds)
