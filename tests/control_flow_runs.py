"""Tests every cell of the table on one engine after the other, and notes how many there were.

    python -m tests.control_flow_runs [ENGINE[:FAMILY] ...]

`make test-control-flow` does so on all engines, which takes hours of two cores. A run for each
family of outermost constructs; what fails is shown, and can be run again by itself. The page of the
documents says when it was last done.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from importlib.metadata import version

from tests import processes
from tests.control_flow import FAMILIES
from tests.control_flow_table import ENGINES, PAGE, RUNS, count, page

TAKES = 3600  # seconds, the longest of them
TEST = "tests/parallel/test_control_flow.py::test_control_flow_gives_what_the_table_says"
OF_ONE = "tests/single/test_control_flow.py::test_control_flow_gives_what_the_table_says"
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


def run(engine, family):
    """Returns how the tests ended."""
    env = {
        "SYNCBN_TEST_CELLS": family,
        "SYNCBN_TEST_ENGINE": f"{engine}:2" if "mirrored" in engine else engine,
        "TF_USE_LEGACY_KERAS": "0",
    }
    return processes.run(commands(engine), takes=TAKES, env=env)


def passed(engine, family, finished):
    """Says whether every process has tested every cell, and found what the table says."""
    numbers = re.findall(r"(\d+) passed\b", processes.unwoven(finished.output))
    ranks = 1 if engine in ("local", "mirrored") else 2
    return finished.code == 0 and numbers == [str(count(engine, family))] * ranks


def main(asked):
    packages = {"TensorFlow": "tensorflow", "Keras": "keras", "tf_keras": "tf_keras"}
    versions = ", ".join(f"{name} {version(package)}" for name, package in packages.items())
    failed = []
    for name in asked or ENGINES:
        engine, _, only = name.partition(":")
        for family in [only] if only else FAMILIES:
            finished = run(engine, family)
            verdict = "passed" if passed(engine, family, finished) else "FAILED"
            print(f"{engine}, {family}: {verdict}, {count(engine, family)} cells", flush=True)
            if verdict == "FAILED":
                failed.append(f"{engine}:{family}")
                print(finished.output, flush=True)
                continue
            runs = json.loads(RUNS.read_text())
            runs.setdefault(engine, {})[family] = {
                "cells": count(engine, family),
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                "versions": versions,
            }
            RUNS.write_text(json.dumps(runs, indent=2) + "\n")
            PAGE.write_text(page())
    if failed:
        raise SystemExit(f"not what the table says: {' '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
