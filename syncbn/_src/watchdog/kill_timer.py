"""A timer by which the kernel kills this process, also where it is stopped."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import signal
import sys
import time
from typing import Any


class _Event(ctypes.Structure):
    """``struct sigevent``."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),  # 0: by the signal
        ("rest", ctypes.c_byte * 48),
    )


class _Times(ctypes.Structure):
    """``struct itimerspec``."""

    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in ("period_seconds", "period_nanoseconds", "seconds", "nanoseconds")
    )


class KillTimer:
    """Kills this process some time after it was set last (``timer_create`` of POSIX, on Linux).

    It needs neither a thread nor a process that runs, so it ends one that is stopped, or whose
    native code keeps all Python threads waiting. It can reach no other process, and no child has
    it. Nothing is counted while the machine sleeps. On another system, or where the C library has
    no such timers, it does nothing.

    Raises:
        OSError: the system has no timer left.
    """

    def __init__(self) -> None:
        self._library = _library()
        if self._library is None:
            return
        timer, event = ctypes.c_void_p(), _Event(None, signal.SIGKILL, 0)
        if self._library.timer_create(
            time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)
        ):
            raise OSError(ctypes.get_errno(), "timer_create")
        self._timer = timer

    def set(self, seconds: float) -> None:
        """Lets the process end so many seconds from now, whatever was set before, or never."""
        if self._library is None:
            return
        whole = 0 if math.isinf(seconds) else math.ceil(seconds)
        self._library.timer_settime(self._timer, 0, ctypes.byref(_Times(0, 0, whole, 0)), None)

    def unset(self) -> None:
        """Lets the process live."""
        self.set(math.inf)


def _library() -> Any:
    """Returns the library that has the timers, if any does."""
    if sys.platform != "linux":
        return None
    # They have a library of their own in glibc before 2.34, and none in musl.
    for name in ("librt.so.1", None):
        with contextlib.suppress(OSError):  # there is no such file
            library = ctypes.CDLL(name, use_errno=True)
            if hasattr(library, "timer_create") and hasattr(library, "timer_settime"):
                return library
    return None


@functools.cache
def own_kill_timer() -> KillTimer:
    """Returns the timer of this process, which is not set at first."""
    return KillTimer()
