"""``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.measuring import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Times the layers and their peers in turn, and writes JSON, a Markdown page "
        "and pictures.",
    )
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
