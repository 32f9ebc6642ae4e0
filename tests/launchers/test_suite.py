"""Runs `tests/parallel` under every launcher, in real processes."""

import re
import sys

import pytest

from tests import processes

TAKES = 180  # seconds, the longest of them

PYTEST = [sys.executable, "-m", "pytest", "--color=no", "-q", "-p", "no:cacheprovider"]
SUITE = [*PYTEST, "tests/parallel"]
# What does not depend on the number of replicas runs with two.
OF_TWO = [
    "accumulation",
    "agreement",
    "collectives",
    "control_flow",
    "distribute",
    "engines",
    "equivalence",
    "local_variables",
    "mixups",
    "second_derivatives",
    "tape",
    "user_reports",
    "worker_fit",
]
# On two levels: what depends on communication, each on one of the engines.
NESTED = {
    "mpi+mirrored": ["nested", "agreement", "collectives", "learning_rate", "same_job", "tape"],
    "horovod-gloo+mirrored": [
        "nested",
        "contract",
        "groups",
        "local_variables",
        "second_derivatives",
    ],
}
# Three ranks of MPI wait busily, on two cores; Horovod over Gloo runs the rest.
FEW = ["groups", "join", "same_job"]


def commands(launcher, size, legacy):
    suite = SUITE
    if launcher in NESTED:
        suite = [*PYTEST, *(f"tests/parallel/test_{part}.py" for part in NESTED[launcher])]
    elif (launcher, size) == ("horovod-mpi", 3):
        suite = [*PYTEST, *(f"tests/parallel/test_{part}.py" for part in FEW)]
    elif size != 2:
        suite = [*SUITE, *(f"--ignore=tests/parallel/test_{part}.py" for part in OF_TWO)]
    elif legacy or launcher == "horovod-mpi":
        # Which knows neither Keras nor what carries Horovod's messages.
        suite = [*SUITE, "--ignore=tests/parallel/test_control_flow.py"]
    if launcher == "mirrored":
        return [("mirrored", suite, {})]
    if launcher == "multiworker":
        return processes.workers(size, *suite)
    across = launcher.partition("+")[0]
    if across == "mpi":
        return [("mpirun", processes.mpirun(size, *suite), {})]
    _, controller = across.split("-")
    return [("horovodrun", processes.horovodrun(size, controller, *suite), {})]


@pytest.mark.parametrize(
    ("launcher", "size", "legacy"),
    [
        *(("mirrored", size, False) for size in (2, 3, 8)),
        *(("multiworker", size, False) for size in (2, 3)),
        *(("mpi", size, False) for size in (2, 3)),
        *(("horovod-gloo", size, False) for size in (2, 3)),
        *(("horovod-mpi", size, False) for size in (2, 3)),
        # The engines do not know Keras; Keras 2 is run once each in one process and in several.
        ("mirrored", 2, True),
        ("mpi", 2, True),
        ("horovod-gloo", 2, True),
        ("multiworker", 2, True),
        # Two replicas in each of two processes.
        ("mpi+mirrored", 2, False),
        ("horovod-gloo+mirrored", 2, True),
    ],
)
def test_the_suite_passes_under(launcher, size, legacy):
    engine = re.sub("-(gloo|mpi)", "", launcher)
    finished = processes.run(
        commands(launcher, size, legacy),
        takes=TAKES,
        env={
            "SYNCBN_TEST_ENGINE": f"{engine}:{size}" if "mirrored" in engine else engine,
            "TF_USE_LEGACY_KERAS": str(int(legacy)),
        },
    )
    assert finished.code == 0, finished.output
    ranks = 1 if engine == "mirrored" else size
    # Not by lines, into which launchers may weave those of several ranks.
    assert len(re.findall(r"\d+ passed", finished.output)) == ranks, finished.output
