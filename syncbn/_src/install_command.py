"""``syncbn install-horovod``: Horovod, built for the TensorFlow of this Python."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from syncbn._src.launch_command import replace_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Leaves the arguments, ``--help`` too, to the script, which gets all of them."""


def run(arguments: argparse.Namespace) -> NoReturn:
    """Becomes the script that builds and installs Horovod, by default for this interpreter."""
    replace_process("install_horovod.sh", ["--python", sys.executable, *arguments.passed_on])
