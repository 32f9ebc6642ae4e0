"""``syncbn bench``: a front end to the benchmarks, which exist in a checkout only."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench``; exits with 2 where there are no benchmarks."""
    checkout = PACKAGE.parent
    # A site-packages folder may have a `benchmarks` of another project.
    if not all(
        (checkout / name).is_file()
        for name in ("pyproject.toml", "benchmarks/measuring/command.py")
    ):
        parser.error(
            "the benchmarks are part of the repository, not of the package. "
            f"Received: the package at {PACKAGE}. "
            "Clone the repository and run `python -m syncbn bench` from its root."
        )
    _command(checkout).add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmarks; returns the exit code."""
    return _command(PACKAGE.parent).run(arguments)


def _command(checkout: Path) -> ModuleType:
    # Ahead of any other `benchmarks` on the path.
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("benchmarks.measuring.command")
    finally:
        sys.path.remove(str(checkout))
