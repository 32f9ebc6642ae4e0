"""Runs scripts of the documentation one after the other, and keeps what each of them prints.

``python -m tests.programs.documented_scripts [--fork] FOLDER SCRIPT...``

Each script is given ``FOLDER/NAME`` as its argument. What it prints goes to ``FOLDER/NAME.RANK``,
whatever a launcher does to the output of its ranks. With ``--fork`` each has a process of its own,
in which TensorFlow is imported and has not started: a process has one MirroredStrategy.
"""

import argparse
import contextlib
import functools
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import tensorflow as tf

import syncbn


def rank():
    if "TF_CONFIG" in os.environ:
        return json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0")))


def run(script, folder):
    """Runs a script; what it prints is kept, and printed too where it fails."""
    sys.argv = [str(script), str(folder / script.stem)]
    sys.path.insert(0, str(script.parent))
    tf.keras.mixed_precision.set_global_policy("float32")
    kept = folder / f"{script.stem}.{rank()}"
    try:
        with kept.open("w") as file, contextlib.redirect_stdout(file):
            runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        print(f"{script.name} fails, having printed:\n{kept.read_text()}", flush=True)
        raise
    finally:
        sys.path.remove(str(script.parent))


def run_in_a_process_of_its_own(script, folder):
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(f"{script.name} has ended with code {code}")
        return
    code = 1
    try:
        run(script, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # not what the parent has registered to be done at its end


# Each script initializes Horovod, as it would alone; the process they share does so once.
syncbn.training.init_horovod = functools.cache(syncbn.training.init_horovod)

parser = argparse.ArgumentParser()
parser.add_argument("--fork", action="store_true")
parser.add_argument("folder", type=Path)
parser.add_argument("scripts", type=Path, nargs="+")
given = parser.parse_args()
folder, scripts = given.folder.resolve(), [one.resolve() for one in given.scripts]
os.chdir(folder)  # where scripts leave their logs and models
for one in scripts:
    (run_in_a_process_of_its_own if given.fork else run)(one, folder)
