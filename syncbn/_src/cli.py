"""The command line: ``python -m syncbn``, or ``syncbn``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from syncbn._src import bench_command
from syncbn._src.doctor import examine
from syncbn._src.models import advice_command
from syncbn._src.models.equivalence import check_command
from syncbn._src.watchdog import diagnose_command

_COMMANDS = {
    "advise": (advice_command, "say which layers of a model need synchronization, from data"),
    "bench": (bench_command, "time the layers and their peers (in a checkout of the repository)"),
    "check": (check_command, "run a model on several replicas and on one, and compare"),
    "diagnose": (diagnose_command, "say who waited for whom, of the records of a job's ranks"),
    "doctor": (examine, "say what this machine has, and try every engine that it finds"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The arguments, or ``None`` for those of the process.

    Returns:
        The exit code: 0 if all is well, 1 if the command found a fault. Wrong arguments exit with
        2.
    """
    parser = argparse.ArgumentParser("syncbn", description="Synchronized batch normalization.")
    parser.add_argument("--version", action="version", version=f"syncbn {version('syncbn')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    words = sys.argv[1:] if arguments is None else arguments
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name == asked:  # `bench` imports modules that the others do not need
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    given = parser.parse_args(words)
    return given.run(given)
