"""The command line: ``python -m syncbn``, or ``syncbn``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version

from syncbn.doctor import examine
from syncbn.models import equivalence

_COMMANDS = {
    "check": (equivalence, "run a model on several replicas and on one, and compare"),
    "doctor": (examine, "say what this machine has, and try every engine that it finds"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Instead of the process's own.

    Returns:
        The exit code: 0 where all is well, 1 where the command found a fault. Wrong arguments exit
        with 2.
    """
    parser = argparse.ArgumentParser("syncbn", description="Synchronized batch normalization.")
    parser.add_argument("--version", action="version", version=f"syncbn {version('syncbn')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    given = parser.parse_args(arguments)
    return given.run(given)
