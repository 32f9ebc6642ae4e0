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


def parts(*but):
    """All parts, but for some."""
    return [part for part in PARTS if part not in but]


# Control flow and what is sent know no Keras.
NO_KERAS = ("agreement", "collectives", "control_flow", "engines", "groups", "mixups")
# Whole models ask over every engine for the same sums and lists.
NO_ENGINE = ("equivalence", "recalibrate")

# Launcher, replicas, whether with Keras 2, parts, and whether with what is marked as arithmetic.
RUNS = [
    # Everything where arithmetic differs: in one process, with either Keras, and in several. Joined
    # datasets and jobs that are told to end are another run's of these engines.
    ("mpi", 2, False, parts("join", "preemption"), True),
    ("mirrored", 2, False, PARTS, True),
    ("mirrored", 2, True, parts(*NO_KERAS), True),
    # Other engines: what is sent, and what becomes of it. Of what is the same for MPI and Horovod,
    # which is all that is above their communicators, Horovod has Keras 2.
    ("horovod-gloo", 2, True, parts(*NO_ENGINE), False),
    ("multiworker", 2, False, parts(*NO_ENGINE), False),
    # What jobs over these have of the other Keras: optimizers, callbacks and `fit`.
    (
        "mpi",
        2,
        True,
        [
            *("accumulation", "distribute", "fit", "learning_rate", "local_variables", "tape"),
            "worker_fit",
        ],
        True,
    ),
    ("multiworker", 2, True, ["fit", "learning_rate", "multi_worker_fit"], False),
    # What carries Horovod's messages is nothing to who sends them, if it carries all kinds.
    ("horovod-mpi", 2, False, ["collectives", "engines", "groups", "worker_fit"], False),
    # Other numbers of replicas: sums of three, uneven groups, workers with nothing at all.
    ("mpi", 3, False, ["contract", "groups", "join", "recalibrate"], False),
    ("horovod-gloo", 3, False, ["distribute", "fit", "groups", "learning_rate"], False),
    ("multiworker", 3, False, ["contract", "fit", "groups"], False),
    ("mirrored", 3, False, ["fit", "groups", "learning_rate", "same_job"], False),
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

# The same on more engines, with the other Keras, and in other numbers.
WIDE = [
    ("mpi", 2, False, ["join", "preemption"], False),
    ("mpi", 2, True, ["contract", "join", "same_job"], False),
    ("horovod-gloo", 2, False, ["contract", "join", "same_job", "tape", "worker_fit"], False),
    ("horovod-mpi", 2, False, ["contract", "join"], False),
    ("horovod-gloo", 3, False, ["contract", "join"], False),
    ("multiworker", 2, True, ["contract"], False),
    ("multiworker", 3, False, ["multi_worker_fit"], False),
    ("mirrored", 3, False, ["contract"], False),
]


def named(run, suffix=""):
    launcher, size, legacy, *_ = run
    return f"{launcher}-{size}-keras{3 - legacy}{suffix}"


def commands(launcher, size, chosen, arithmetic):
    suite = [*PYTEST, *(f"tests/parallel/test_{part}.py" for part in chosen)]
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
    ("launcher", "size", "legacy", "chosen", "arithmetic"),
    [
        *(pytest.param(*run, id=named(run)) for run in RUNS),
        *(pytest.param(*run, id=named(run, "-wide"), marks=pytest.mark.wide) for run in WIDE),
    ],
)
def test_the_suite_passes_under(launcher, size, legacy, chosen, arithmetic):
    engine = re.sub("-(gloo|mpi)", "", launcher)
    finished = processes.run(
        commands(launcher, size, chosen, arithmetic),
        takes=TAKES,
        hide=not {"recalibrate", "same_job"} & {*chosen},
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
