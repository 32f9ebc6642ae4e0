"""What options of several commands take."""

from __future__ import annotations

import argparse


def positive_whole_number(text: str) -> int:
    """Returns the number that an option is given.

    Raises:
        argparse.ArgumentTypeError: it is no positive whole number.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number. Received: {text}")
    return int(text)
