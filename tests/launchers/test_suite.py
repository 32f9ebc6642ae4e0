"""Runs `tests/parallel` under every launcher, in real processes."""

import re
import sys

import pytest

from tests import processes

TAKES = 120  # seconds, the longest of them

PYTEST = [sys.executable, "-m", "pytest", "--color=no", "-q", *("-p", "no:cacheprovider")]
PYTEST += ["-p", "no:xdist"]
PARTS = sorted(
    file.stem.removeprefix("test_")
    for file in (processes.ROOT / "tests" / "parallel").glob("test_*.py")
)
# Control flow and what is sent know no Keras.
OF_KERAS = [
    part
    for part in PARTS
    if part not in ("agreement", "collectives", "control_flow", "engines", "groups", "mixups")
]
# Whole models ask over every engine for the same sums and lists.
OF_MESSAGES = [part for part in PARTS if part not in ("equivalence", "recalibrate")]
# What a job between processes has of Keras.
OF_A_JOB = ["contract", "distribute", "fit", "join", "same_job", "tape", "worker_fit"]

# Launcher, replicas, whether with Keras 2, parts, and whether with what is marked as arithmetic.
RUNS = [
    # Everything where arithmetic differs: in one process and in several.
    ("mpi", 2, False, PARTS, True),
    ("mirrored", 2, False, PARTS, True),
    ("mirrored", 2, True, OF_KERAS, True),
    # Other engines: what is sent, and what becomes of it. Of what is the same for MPI and Horovod,
    # which is all that is above their communicators, Horovod has Keras 2.
    ("horovod-gloo", 2, True, OF_MESSAGES, False),
    ("multiworker", 2, False, OF_MESSAGES, False),
    # What jobs over these have of the other Keras: optimizers, callbacks and `fit`.
    ("mpi", 2, True, OF_A_JOB, False),
    ("horovod-gloo", 2, False, OF_A_JOB, False),
    ("multiworker", 2, True, ["contract", "fit", "learning_rate", "multi_worker_fit"], False),
    # What carries Horovod's messages is nothing to who sends them, if it carries all kinds.
    ("horovod-mpi", 2, False, ["collectives", "contract", "engines", "groups", "join"], False),
    # Other numbers of replicas: sums of three, uneven groups, workers with nothing at all.
    ("mpi", 3, False, ["contract", "groups", "join", "recalibrate"], False),
    ("horovod-gloo", 3, False, ["contract", "groups", "join", "learning_rate"], False),
    ("multiworker", 3, False, ["contract", "fit", "groups", "multi_worker_fit"], False),
    ("mirrored", 3, False, ["contract", "fit", "groups", "learning_rate", "same_job"], False),
    ("mirrored", 8, False, ["contract", "groups"], False),
    # Two replicas in each of two processes: what depends on communication, each on one of the
    # engines. First what uneven processes are told, which groups that were made before do not ask.
    (
        "mpi+mirrored",
        2,
        False,
        [
            *("nested", "advice", "agreement", "collectives", "learning_rate", "preemption"),
            *("same_job", "tape"),
        ],
        False,
    ),
    (
        "horovod-gloo+mirrored",
        2,
        True,
        ["nested", "contract", "groups", "local_variables", "second_derivatives"],
        False,
    ),
]


def commands(launcher, size, parts, arithmetic):
    suite = [*PYTEST, *(f"tests/parallel/test_{part}.py" for part in parts)]
    if not arithmetic:
        suite += ["-m", "not arithmetic"]
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
    ("launcher", "size", "legacy", "parts", "arithmetic"),
    RUNS,
    ids=[f"{launcher}-{size}-keras{3 - legacy}" for launcher, size, legacy, *_ in RUNS],
)
def test_the_suite_passes_under(launcher, size, legacy, parts, arithmetic):
    engine = re.sub("-(gloo|mpi)", "", launcher)
    finished = processes.run(
        commands(launcher, size, parts, arithmetic),
        takes=TAKES,
        hide=not {"recalibrate", "same_job"} & {*parts},
        env={
            "SYNCBN_TEST_ENGINE": f"{engine}:{size}" if "mirrored" in engine else engine,
            "TF_USE_LEGACY_KERAS": str(int(legacy)),
            # Ten times as often, and nobody else would compute on these few cores.
            "HOROVOD_CYCLE_TIME": "1",
        },
    )
    assert finished.code == 0, finished.output
    ranks = 1 if engine == "mirrored" else size
    passed = re.findall(r"\d+ passed", processes.unwoven(finished.output))
    assert len(passed) == ranks, finished.output
