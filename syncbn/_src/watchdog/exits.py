"""The ways out of a process: the other ranks are told, and wait no longer."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from syncbn._src.communicators.launcher import running_mpi
from syncbn._src.watchdog.waiting_limits import is_on
from syncbn._src.watchdog.watchdog import current


def install() -> None:
    """Makes an exception that ends this process known to the other ranks.

    Under MPI an exception also ends the job, as ``python -m mpi4py`` would: MPI itself would wait
    at this rank's end for the others, and these in a collective for this one.
    """
    before, process = sys.excepthook, os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        if os.getpid() == process:
            watchdog = current()
            try:
                if watchdog is not None:
                    if watchdog.is_running():
                        watchdog.tell(f"has failed: {kind.__name__}: {str(error)[:500]}")
                    watchdog.say_who_is_gone()
            finally:
                _abort_mpi()

    sys.excepthook = hook


def _abort_mpi() -> None:
    mpi = running_mpi()
    if mpi is not None and mpi.COMM_WORLD.size > 1 and is_on():
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(1)
