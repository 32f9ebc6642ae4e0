"""The command line: ``python -m syncbn``, or ``syncbn``.

A command's module is imported once it is asked for, and TensorFlow once it is run, so that
``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from syncbn._src.communicators.launcher import launched
from syncbn._src.named_functions import UsageError
from syncbn._src.version import VERSION


class CommandModule(NamedTuple):
    """A command."""

    module: str
    """In `syncbn._src`, with the functions ``add_arguments(parser)`` and ``run(arguments)``."""
    summary: str
    own: int | None = None
    """How many words it reads itself, its name included, and ``--help`` directly behind the name;
    all that follow it passes on, unread, as ``arguments.passed_on``. ``None`` if it reads all."""
    imports_package: bool = False
    """Whether it runs a user's code, for which all of `syncbn` is to be imported first."""


_COMMANDS = {
    "advise": CommandModule(
        "models.advice_command",
        "say which layers of a model need synchronization, from data",
        imports_package=True,
    ),
    "bench": CommandModule("bench_command", "time the layers and their peers, under every engine"),
    "check": CommandModule(
        "models.equivalence.check_command",
        "run a model on several replicas and on one, and compare",
        imports_package=True,
    ),
    "diagnose": CommandModule(
        "watchdog.diagnose_command", "say who waited for whom, of the records of a job's ranks"
    ),
    "doctor": CommandModule(
        "doctor.doctor_command", "say what this machine has, and try every engine that it finds"
    ),
    "install-horovod": CommandModule(
        "install_command", "build Horovod for the TensorFlow that is installed", own=1
    ),
    "launch": CommandModule(
        "launch_command", "start the processes of a job, under each engine", own=2
    ),
    "report": CommandModule(
        "models.report_command", "say what synchronization costs a model", imports_package=True
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The arguments, or ``None`` for those of the process.

    Returns:
        The exit code: 0 if all is well, 1 if the command found a fault, 2 if it could not do what
        it was to do. Wrong arguments exit with 2.

    Raises:
        Exception: in a job of several processes, what the command raises.
    """
    parser = argparse.ArgumentParser("syncbn", description="Synchronized batch normalization.")
    parser.add_argument("--version", action="version", version=f"syncbn {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = next((word for word in words if not word.startswith("-")), None)
    passed_on: list[str] = []
    for name, (module_name, summary, own, _) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name != asked:  # `bench` imports modules that the others do not need
            continue
        module = importlib.import_module(f"syncbn._src.{module_name}")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        if own is not None:
            end = words.index(name) + own
            end += words[end : end + 1] in (["-h"], ["--help"]) and own == 1
            words, passed_on = words[:end], words[end:]
    given = parser.parse_args(words)
    given.passed_on = passed_on
    if _COMMANDS[asked or ""].imports_package:
        importlib.import_module("syncbn._src.interface")
    try:
        return given.run(given)
    except Exception as error:
        if launched().processes > 1:
            raise  # which ends the job, where other ranks wait for this one
        if isinstance(error, UsageError):
            print(f"syncbn {asked}: {error}", file=sys.stderr)
        else:  # it may be the user's code that fails, which needs the traceback
            traceback.print_exc()
        return 2
