"""Running the scripts of launch/, with commands in the place of those that they start."""

import os
import re
import shlex

from tests import processes

LAUNCH = processes.ROOT / "launch"

ARGUMENTS = ["a  b", "$(echo hi)", "`id`", '"q"', "it's", "*", "", "--help", "--"]


def launch(script, *arguments, **env):
    """Runs a script of launch/; ``env`` changes its environment."""
    return processes.run([(script, [str(LAUNCH / script), *arguments], env)])


def path(folder):
    """The PATH with ``folder`` first, and this environment's commands next."""
    return os.pathsep.join([str(folder), processes.environment()["PATH"]])


def fake(folder, name, *, version="", code=0):
    """Puts a command on the way that prints its arguments, one a line, instead of what it is."""
    (folder / name).write_text(
        f"""#!/bin/bash
        if [ "$1" = --version ]; then echo {shlex.quote(version)}; exit 0; fi
        printf '<%s>\\n' "$@"
        env | grep -E '^(HOROVOD|TF_NUM)_'
        exit {code}
        """
    )
    (folder / name).chmod(0o755)


def printed(output):
    """The arguments that a fake command was started with."""
    return re.findall(r"^<(.*)>$", output, re.MULTILINE)
