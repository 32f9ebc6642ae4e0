"""How long tests wait for what may hang: the one place of their hard limits.

A limit ends what hangs, and says nothing about speed. ``SYNCBN_TEST_PATIENCE=3`` triples all of
them, for a machine that is busier or slower than tenfold.
"""

import math
import os
import time

import pytest

VARIABLE = "SYNCBN_TEST_PATIENCE"


def factor():
    """What the environment multiplies all limits by: 1 where it says nothing."""
    given = os.environ.get(VARIABLE, "1")
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise pytest.UsageError(f"{VARIABLE} must be a positive number. Received: {given!r}")
    return number


def limit(takes=12):
    """The seconds after which what ``takes`` so many on a quiet machine is said to hang."""
    return max(120, 10 * takes) * factor()


def soon(condition):
    """Waits for what another thread does."""
    deadline = time.monotonic() + limit()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
