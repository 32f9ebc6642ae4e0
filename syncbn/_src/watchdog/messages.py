"""What the watchdog says, and the code of a process that it ends."""

from __future__ import annotations

import sys
from typing import Any

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
ENDED = "has ended"
"""The status of a rank that has come to the end of its script."""
_OUT_OF_DATA = " (if it ran out of batches, syncbn.training.join(dataset) gives it empty ones)"


def tell_user(text: str) -> None:
    """Writes a line of the watchdog's."""
    # In one piece: launchers weave the lines of several ranks.
    sys.stderr.write(f"syncbn: {text}\n")
    sys.stderr.flush()


def call_text(name: str, number: int) -> str:
    """Says which call of an operation one is."""
    return f"{name} (call {number})"


def description(one: dict[str, Any]) -> str:
    """Says what a rank is at."""
    if one["rank"] is None:
        return f"{one['more']} more ranks are not in it"
    who = f"rank {one['rank']}"
    if "host" in one:
        who += f" (process {one['pid']} on {one['host']})"
    status = one["status"]
    if status == "lost":
        return f"{who} is gone without a word{_last(one)}"
    if status == "silent":
        ago = f" for {one['silent']:.0f} s" if "silent" in one else ""
        return f"{who} has not answered{ago}{_last(one)}"
    if status == ENDED:
        return f"{who} {status}{_last(one)}{_OUT_OF_DATA}"
    if status != "running":
        return f"{who} {status}{_last(one)}"
    if one.get("waiting"):
        return f"{who} is in {call_text(*one['waiting'])}"
    _, done = one.get("done") or (None, None)
    times = "" if done is None else f", and has done this one {done} times"
    return f"{who} is in no collective{times}{_last(one)}"


def _last(one: dict[str, Any]) -> str:
    last = one.get("last")
    if not last or last["left"] is None:
        return ""
    ago = one["now"] - last["left"]
    call = call_text(last["name"], last["number"])
    return f"; it left its last one, {call}, {ago:.0f} s before"
