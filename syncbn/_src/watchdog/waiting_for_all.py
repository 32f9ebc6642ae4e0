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
from syncbn._src.watchdog.waiting_limits import Limits, is_on, limits

_PERIOD = 1.0
"""Seconds between two looks."""


@contextlib.contextmanager
def within_limits(
    what: str,
    end: Callable[[int], object] = os._exit,
    waited: Callable[[], float] | None = None,
) -> Iterator[threading.Event]:
    """Ends the job where what is done within, which waits for all ranks, takes too long.

    No rank knows anything of the others yet, so it cannot be said who is missing. The limits are
    this process's own.

    Args:
        what: What all ranks have to do, and at least one has not done.
        end: Ends this process, and with it the job, with a code.
        waited: Returns for how many seconds this process has waited; by default since now.

    Yields:
        An event that ends the watch, which is set at the end.
    """
    begin, come = time.monotonic(), threading.Event()
    seconds = waited or (lambda: time.monotonic() - begin)

    def watch(own: Limits) -> None:
        warned = False
        while not come.wait(_PERIOD):
            so_far = seconds()
            where = f"process {os.getpid()} on {socket.gethostname()}"
            told = f"{where} has waited {so_far:.0f} s for all ranks to {what}"
            if so_far > own.end:
                tell_user(f"{told}, the limit of {own.end:g} s. The job ends")
                sys.stdout.flush()
                end(EXIT_CODE)
            if so_far > own.warn and not warned:
                warned = True
                tell_user(f"{told}; at least one has not")

    own = _own_limits()
    if own is not None:
        name = "syncbn-waiting-for-all"
        threading.Thread(target=watch, args=(own,), name=name, daemon=True).start()
    try:
        yield come
    finally:
        come.set()


@contextlib.contextmanager
def starting_within_limits() -> Iterator[None]:
    """The same for the start of an engine that keeps all other threads from running.

    MPI and the cluster of tf.distribute hold Python's global lock while they wait for all
    processes. Then the process ends a little later, with its stack for a message, by the timer of
    `faulthandler`, of which a process has one.
    """
    own, armed = _own_limits(), False
    with within_limits("start"):
        # No limit, one beyond what the timer counts, or a file without a descriptor.
        with contextlib.suppress(OSError, OverflowError, ValueError):
            if own is not None and sys.__stderr__ is not None:
                after = own.end + 2 * _PERIOD
                faulthandler.dump_traceback_later(after, exit=True, file=sys.__stderr__)
                armed = True
        try:
            yield
        finally:
            if armed:
                faulthandler.cancel_dump_traceback_later()


def _own_limits() -> Limits | None:
    """Returns the limits, or nothing where the watchdog is off, or will refuse what is set."""
    with contextlib.suppress(ValueError):
        return limits() if is_on() else None
    return None
