"""How long a rank may wait, as the environment says."""

from __future__ import annotations

import os
from typing import NamedTuple


class Limits(NamedTuple):
    """Seconds that a rank waits in a collective; infinite where there is no limit."""

    warn: float
    """Until it says so: ``SYNCBN_WARN_SECONDS``, 30 by default."""
    end: float
    """Until the job ends: ``SYNCBN_TIMEOUT_SECONDS``, 600 by default."""


def limits() -> Limits:
    """Returns the limits.

    Raises:
        ValueError: a variable is no number, or a negative one.
    """
    return Limits(_seconds("SYNCBN_WARN_SECONDS", 30.0), _seconds("SYNCBN_TIMEOUT_SECONDS", 600.0))


def is_on() -> bool:
    """Says whether jobs of several processes are watched: ``SYNCBN_WATCHDOG=0`` forbids it."""
    return os.environ.get("SYNCBN_WATCHDOG", "1") != "0"


def _seconds(variable: str, default: float) -> float:
    given = os.environ.get(variable, "")
    try:
        seconds = float(given or default)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(
            f"{variable} must be a number of seconds, or 0 for no limit. Received: {given}"
        )
    return seconds or float("inf")
