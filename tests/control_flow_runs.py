"""Tests every cell of the table on one engine after the other, and notes how many there were.

    python -m tests.control_flow_runs [ENGINE ...]

`make test-control-flow` does so on all engines, in some hours of two cores. The page of the
documents says when it was last done.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from importlib.metadata import version

from tests import processes
from tests.control_flow_table import ENGINES, PAGE, RUNS, page

TAKES = 3600  # seconds, the longest of them
TEST = "tests/parallel/test_control_flow.py::test_a_cell_is_what_the_table_says"
OF_ONE = "tests/single/test_control_flow.py::test_a_cell_is_what_the_table_says"
OF_PLAIN = (
    "tests/single/test_control_flow.py::"
    "test_where_tensorflow_is_said_to_refuse_the_plain_layer_it_does"
)
PYTEST = [sys.executable, "-m", "pytest", "--color=no", "-q", "-p", "no:cacheprovider"]


def commands(engine):
    """Returns those that `processes.run` starts, for two replicas, or two in each of two."""
    if engine == "local":
        return [(engine, [*PYTEST, OF_ONE, OF_PLAIN], {})]
    suite = [*PYTEST, TEST]
    if engine == "mirrored":
        return [(engine, suite, {})]
    if engine == "multiworker":
        return processes.workers(2, *suite)
    if engine.startswith("mpi"):
        return [(engine, processes.mpirun(2, *suite), {})]
    return [(engine, processes.horovodrun(2, "gloo", *suite), {})]


def run(engine):
    """Returns how many cells were as the table says.

    Raises:
        RuntimeError: some were not, were left out, or ranks tested different numbers.
    """
    env = {
        "SYNCBN_TEST_CELLS": "all",
        "SYNCBN_TEST_ENGINE": f"{engine}:2" if "mirrored" in engine else engine,
        "TF_USE_LEGACY_KERAS": "0",
    }
    finished = processes.run(commands(engine), takes=TAKES, env=env)
    # Not by lines, into which launchers may weave those of several ranks.
    passed = re.findall(r"(\d+) passed in", finished.output)
    ranks = 1 if engine in ("local", "mirrored") else 2
    if finished.code or len(passed) != ranks or len({*passed}) > 1:
        raise RuntimeError(f"{engine}: not all cells are what the table says.\n{finished.output}")
    return int(passed[0])


def main(engines):
    packages = {"TensorFlow": "tensorflow", "Keras": "keras", "tf_keras": "tf_keras"}
    versions = ", ".join(f"{name} {version(package)}" for name, package in packages.items())
    for engine in engines or ENGINES:
        number = run(engine)
        runs = json.loads(RUNS.read_text()) if RUNS.exists() else {}
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        runs[engine] = {"cells": number, "date": today, "versions": versions}
        RUNS.write_text(json.dumps(runs, indent=2) + "\n")
        print(f"{engine}: {number} cells", flush=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
