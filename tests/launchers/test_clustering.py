"""The contract under XLA's automatic clustering, on every engine, with Keras 2 and 3."""

import re
import sys

import pytest

from tests import processes

TAKES = 120  # seconds, the longest of them

TESTS = ["tests/parallel/test_clustering.py", "tests/parallel/test_contract.py"]
# What runs eagerly is not compiled, so the contract's graphs will do.
PYTEST = [sys.executable, "-m", "pytest", "--color=no", "-q", "-p", "no:cacheprovider"]
GRAPHS = ["-k", "clustering or graph or drawn"]


def commands(engine):
    if engine == "local":
        return [("local", [*PYTEST, TESTS[0]], {})]
    if engine == "mirrored:2":
        return [(engine, [*PYTEST, *TESTS, *GRAPHS], {})]
    # What XLA makes of arithmetic it makes in one process too, and what it makes of the contract's
    # messages between two.
    command = [*PYTEST, *(TESTS if engine == "mpi" else TESTS[:1]), *GRAPHS, "-m", "not arithmetic"]
    if engine == "multiworker":
        return processes.workers(2, *command)
    if engine == "horovod":
        return [(engine, processes.horovodrun(2, "gloo", *command), {})]
    return [(engine, processes.mpirun(2, *command), {})]


@pytest.mark.parametrize(
    ("engine", "legacy"),
    [
        *((engine, False) for engine in ("local", "mirrored:2", "multiworker", "horovod", "mpi")),
        ("mpi+mirrored:2", False),
        # Keras has no part in what XLA makes of collectives; one replica, which has none, shows
        # that the layers themselves are the same.
        ("local", True),
    ],
)
def test_what_xla_compiles_around_collectives_is_right_under(engine, legacy, tmp_path):
    finished = processes.run(
        commands(engine),
        takes=TAKES,
        env={
            "SYNCBN_TEST_ENGINE": engine,
            "SYNCBN_TEST_CLUSTERS": str(tmp_path),
            "TF_USE_LEGACY_KERAS": str(int(legacy)),
        },
    )
    assert finished.code == 0, finished.output
    ranks = 1 if engine in ("local", "mirrored:2") else 2
    passed = re.findall(r"\d+ passed", processes.unwoven(finished.output))
    assert len(passed) == ranks, finished.output
    assert len(list(tmp_path.iterdir())) == ranks
