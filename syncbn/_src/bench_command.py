"""``syncbn bench``: a front end to the benchmarks, which the package has with it."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

BUNDLED = Path(__file__).with_name("bundled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench``; exits with 2 where there are no benchmarks."""
    if not (BUNDLED / "benchmarks" / "measuring" / "command.py").is_file():
        parser.error(
            f"the benchmarks were left out of this package. Received: none in {BUNDLED}. "
            "Install the wheel, or run `python -m syncbn bench` in a checkout of the repository."
        )
    _command().add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmarks; returns the exit code."""
    return _command().run(arguments)


def _command() -> ModuleType:
    # Ahead of any other `benchmarks` on the path, and only while they are imported.
    sys.path.insert(0, str(BUNDLED))
    try:
        return importlib.import_module("benchmarks.measuring.command")
    finally:
        sys.path.remove(str(BUNDLED))
