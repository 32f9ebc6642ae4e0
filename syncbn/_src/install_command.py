"""``syncbn install-horovod``: Horovod, built for the TensorFlow of this Python."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from syncbn._src.launch_command import LAUNCHERS, replace_process

_SCRIPT = "install_horovod.sh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Leaves the arguments to the script, whose comment at its head is the help."""
    head = (LAUNCHERS / _SCRIPT).read_text().partition("\nset -euo")[0].splitlines()[1:]
    lines = [line.removeprefix("#").removeprefix(" ") for line in head]
    (usage,) = [line for line in lines if line.startswith("usage: ")]
    parser.usage = usage.removeprefix("usage: ")
    lines.remove(usage)
    parser.description = "\n".join(lines).replace("\n\n\n", "\n\n")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(arguments: argparse.Namespace) -> NoReturn:
    """Becomes the script that builds and installs Horovod, by default for this interpreter."""
    replace_process(_SCRIPT, ["--python", sys.executable, *arguments.passed_on])
