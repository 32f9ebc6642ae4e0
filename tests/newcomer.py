"""Plays a newcomer who has nothing but the wheel, and does what the pages say, in their order.

    python -m tests.newcomer [--python PYTHON]

`make test-newcomer` does so. In a fresh environment it installs the wheel from the package index,
runs the commands and the code of docs/start.md, installs MPI and Horovod, and runs the scripts of
the README and those of docs/migration.md, each by the command that its page gives. It ends with a
table of what each step has taken, and with 1 where one has failed.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

from syncbn._src.text_tables import with_rule
from tests import documentation, processes

ROOT = processes.ROOT
START = ROOT / "docs" / "start.md"
# The model that the page leaves to the reader.
MY_MODULE = """
import tensorflow as tf, syncbn

def build_model():
    layers = [tf.keras.layers.Conv2D(4, 3), syncbn.SyncBatchNormalization()]
    return tf.keras.Sequential([tf.keras.Input((8, 8, 3)), *layers])
"""


class Newcomer:
    """Runs commands in an environment and a folder of its own, and notes what they take."""

    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        self.rows = []
        self.failed = False

    def does(self, what, command, takes=60):
        """Runs a command line of a page, and shows its output where it fails."""
        print(f"{what}: {command}", flush=True)
        path = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        # Without make's constraints, and on as few cores as there are.
        env = {"PATH": path, "PYTHONPATH": "", "PIP_CONSTRAINT": ""}
        env["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
        begin = time.monotonic()
        finished = processes.run(
            [(what, ["bash", "-ceu", command], env)], takes=takes, hide=False, cwd=self.folder
        )
        seconds = time.monotonic() - begin
        if finished.code:
            self.failed = True
            print(finished.output, flush=True)
        verdict = f"failed with {finished.code}" if finished.code else "done"
        self.rows.append([what, f"{seconds:.0f} s", verdict])
        return finished

    def takes_the_wheel(self):
        """Builds the wheel, which a user would get from the package index, and returns it."""
        source = shlex.quote(str(ROOT))
        self.does(
            "make the wheel", f"{shlex.quote(self.python)} -m pip wheel -q --no-deps {source}"
        )
        (wheel,) = self.folder.glob("*.whl")
        return wheel

    def follows_the_start_page(self, wheel):
        """Does all that it says, from the top."""
        (self.folder / "my_module.py").write_text(MY_MODULE)
        code = []
        for block in documentation.blocks(START):
            if block.language == "python":
                code.append(block.text)
                continue
            if code:
                (self.folder / "start_page.py").write_text("\n".join(code))
                self.does("start page: its code", "python start_page.py")
                code = []
            for line in block.text.splitlines():
                line = line.partition("#")[0].strip()
                line = line.replace("pip install .", f"pip install -q {wheel.name}")
                line = line.replace("python3 -m venv", f"{shlex.quote(self.python)} -m venv")
                self.does(f"start page: {line.split(' && ')[0]}", line, takes=300)

    def installs_the_engines(self, wheel):
        """MPI and Horovod, and what the pages name besides."""
        self.does("install MPI", f"pip install -q '{wheel.name}[mpi]'", takes=300)
        self.does("install Horovod", "syncbn install-horovod", takes=600)
        self.does("install TensorBoard", "pip install -q tensorboard", takes=300)
        self.does("all engines", "syncbn doctor", takes=120)

    def runs_the_scripts(self):
        """Those of the README, and those after migration, by the commands of their pages."""
        for path in documentation.SCRIPTS.glob("*.py"):
            shutil.copy(path, self.folder)
        for script in documentation.scripts():
            of_readme = re.fullmatch(r"mirrored\.py|(multiworker|horovod|mpi)_job\.py", script.name)
            if of_readme or (script.name.endswith("_after.py") and not script.keras_2):
                (self.folder / script.name).write_text(script.text)
                command = script.command.replace("FOLDER", script.name.removesuffix(".py"))
                self.does(script.name, command, takes=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default="python3", help="who makes the environment")
    python = shutil.which(parser.parse_args().python)
    if python is None:
        parser.error("there is no such Python")
    with tempfile.TemporaryDirectory() as name:
        newcomer = Newcomer(Path(name), python)
        wheel = newcomer.takes_the_wheel()
        newcomer.follows_the_start_page(wheel)
        newcomer.installs_the_engines(wheel)
        newcomer.runs_the_scripts()
        print(with_rule([["step", "took", ""], *newcomer.rows], [], {1}), flush=True)
    sys.exit(1 if newcomer.failed else 0)


if __name__ == "__main__":
    main()
