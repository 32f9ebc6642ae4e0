"""What the watchdog says, and the code of a process that it ends."""

from __future__ import annotations

import sys

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""


def tell_user(text: str) -> None:
    """Writes a line of the watchdog's."""
    # In one piece: launchers weave the lines of several ranks.
    sys.stderr.write(f"syncbn: {text}\n")
    sys.stderr.flush()
