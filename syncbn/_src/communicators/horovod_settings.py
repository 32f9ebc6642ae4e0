"""Horovod's settings for small messages: what is in force, and what is better for these layers.

Horovod reads them from the environment when it is initialized, and never again. Tried with 0.28.1:
set in a rank before ``hvd.init()`` they take effect, set after it they do not.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import NamedTuple

from syncbn._src.communicators.launcher import is_elastic

_log = logging.getLogger("syncbn")


class Setting(NamedTuple):
    """An environment variable."""

    name: str
    own: str
    """Horovod's default."""
    better: str
    """The better value for small messages; `syncbn launch horovod --help` has the figures."""

    def __str__(self) -> str:
        return f"{self.name}={os.environ.get(self.name) or self.own}"


def settings(controller: str | None = None, size: int | None = None) -> list[Setting]:
    """Returns the settings that matter, with the better values for a job.

    Args:
        controller: ``"gloo"`` or ``"mpi"``; ``None`` for what horovodrun has told this process.
        size: The number of processes; likewise.
    """
    if controller is None:
        controller = os.environ.get("HOROVOD_CONTROLLER", "mpi").lower()
    if size is None:
        size = int(os.environ.get("HOROVOD_SIZE") or 1)
    # Over Gloo, few ranks negotiate a message in fewer rounds than the response cache takes. All
    # must agree on it, and those of an elastic job start with different sizes.
    without_cache = controller == "gloo" and size <= 8 and not is_elastic()
    return [
        Setting("HOROVOD_CYCLE_TIME", "1", "0.1"),
        Setting("HOROVOD_CACHE_CAPACITY", "1024", "0" if without_cache else "1024"),
    ]


def in_force(controller: str | None = None, size: int | None = None) -> str:
    """Returns the settings in force, as a text, as far as the environment shows them."""
    return ", ".join(map(str, settings(controller, size)))


def to_be_set(controller: str | None = None, size: int | None = None) -> list[Setting]:
    """Returns the settings that are not set and have a better value than Horovod's default."""
    if os.environ.get("HOROVOD_AUTOTUNE") == "1":  # which tunes those that are not set
        return []
    return [
        one
        for one in settings(controller, size)
        if not os.environ.get(one.name) and one.better != one.own
    ]


def advice(controller: str | None = None, size: int | None = None) -> str | None:
    """Returns what to do about settings that are not set, or ``None``."""
    unmade = to_be_set(controller, size)
    if not unmade:
        return None
    return (
        f"Horovod has {' and '.join(map(str, unmade))}, its default, with which small messages are "
        f"slow: set {' and '.join(f'{one.name}={one.better}' for one in unmade)} before it is "
        "initialized, by syncbn.training.init_horovod() in place of hvd.init(), or as "
        "`syncbn launch horovod` does"
    )


@functools.cache
def advise_once() -> None:
    """Logs the advice, if any, at the first call."""
    text = advice()
    if text:
        _log.warning("%s.", text)
