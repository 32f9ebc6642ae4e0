"""``syncbn launch``: replaces itself by one of the launchers, which the package has with it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

LAUNCHERS = Path(__file__).with_name("bundled") / "launch"
"""The folder of the launchers: in a checkout a link, in an installed package a copy."""

_SCRIPTS = {
    "horovod": "horovod.sh",
    "mirrored": "mirrored.sh",
    "mpi": "mpi.sh",
    "multiworker": "multiworker.py",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of ``launch`` that is its own."""
    parser.usage = "%(prog)s ENGINE [OPTION...] -- COMMAND..."
    parser.epilog = (
        "`syncbn launch ENGINE --help` has an engine's options. The command gets its arguments as "
        "they are; the exit code is the launcher's."
    )
    parser.add_argument(
        "engine",
        metavar="ENGINE",
        choices=list(_SCRIPTS),
        help=f"what joins the processes: {', '.join(_SCRIPTS)}",
    )


def run(arguments: argparse.Namespace) -> NoReturn:
    """Becomes the launcher, and so passes on arguments, signals and the exit code."""
    replace_process(_SCRIPTS[arguments.engine], arguments.passed_on)


def replace_process(script: str, arguments: list[str]) -> NoReturn:
    """Replaces this process by a script of `LAUNCHERS`, in this Python's environment."""
    # By their interpreters: not every installer leaves files executable.
    interpreter = [sys.executable] if script.endswith(".py") else ["/usr/bin/env", "bash"]
    command = [*interpreter, str(LAUNCHERS / script), *arguments]
    folder = os.path.dirname(sys.executable)
    paths = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if folder not in paths:  # an environment that is not activated
        os.environ["PATH"] = os.pathsep.join([folder, *paths])
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  (no shell)
