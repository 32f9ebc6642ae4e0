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


# Launcher, replicas, whether with Keras 2, parts, and whether with what is marked as arithmetic.
RUNS = [
    # Everything where arithmetic differs: in one process, with either Keras, and in several.
    # Control flow and what is sent know no Keras.
    ("mpi", 2, False, parts("join", "preemption"), True),
    ("mirrored", 2, False, parts("evaluation", "preemption"), True),
    (
        "mirrored",
        2,
        True,
        parts(
            *("agreement", "collectives", "control_flow", "engines", "groups", "mixups"),
            "preemption",
        ),
        True,
    ),
    # Other engines: what is sent, and what becomes of it. Whole models ask over every engine for
    # the same sums and lists. Of what is the same for MPI and Horovod, which is all that is above
    # their communicators, Horovod has Keras 2.
    ("horovod-gloo", 2, True, parts("equivalence", "recalibrate"), False),
    (
        "multiworker",
        2,
        False,
        parts(
            *("equivalence", "recalibrate", "agreement", "elastic", "same_job"),
            "second_derivatives",
        ),
        False,
    ),
    # What jobs over these have of the other Keras: optimizers, callbacks and `fit`.
    ("mpi", 2, True, ["contract", "distribute", "fit", "tape"], False),
    ("multiworker", 2, True, ["fit", "learning_rate", "multi_worker_fit"], False),
    # What carries Horovod's messages is nothing to who sends them, if it carries all kinds.
    ("horovod-mpi", 2, False, ["collectives", "engines", "groups", "worker_fit"], False),
    # Other numbers of replicas: sums of three, uneven groups, workers with nothing at all.
    ("mpi", 3, False, ["contract", "groups", "join"], False),
    ("horovod-gloo", 3, False, ["distribute", "fit", "groups", "learning_rate"], False),
    ("multiworker", 3, False, ["contract", "fit", "groups"], False),
    ("mirrored", 3, False, ["contract", "fit", "groups"], False),
    # Two replicas in each of two processes: what depends on communication, each on one of the
    # engines. First what uneven processes are told, which groups made before do not ask.
    ("mpi+mirrored", 2, False, ["nested", "agreement", "collectives", "preemption"], False),
    (
        "horovod-gloo+mirrored",
        2,
        True,
        ["nested", "groups", "local_variables", "second_derivatives"],
        False,
    ),
]

# On more engines, with the other Keras and in other numbers: what these reach of the package, those
# above reach, too.
WIDE = [
    ("mpi", 2, False, ["join", "preemption"], False),
    ("mpi", 2, True, ["join", "same_job", "worker_fit"], False),
    ("mirrored", 2, False, ["evaluation", "preemption"], False),
    ("mirrored", 2, True, ["preemption"], False),
    (
        "horovod-gloo",
        2,
        False,
        ["contract", "distribute", "fit", "join", "same_job", "tape", "worker_fit"],
        False,
    ),
    (
        "multiworker",
        2,
        False,
        ["agreement", "elastic", "same_job", "second_derivatives"],
        False,
    ),
    ("multiworker", 2, True, ["contract"], False),
    ("horovod-mpi", 2, False, ["contract", "join"], False),
    ("mpi", 3, False, ["recalibrate"], False),
    ("horovod-gloo", 3, False, ["contract", "join"], False),
    ("multiworker", 3, False, ["multi_worker_fit"], False),
    ("mirrored", 3, False, ["learning_rate", "same_job"], False),
    ("mirrored", 8, False, ["contract", "groups"], False),
    ("mpi+mirrored", 2, False, ["advice", "learning_rate", "same_job", "tape"], False),
    ("horovod-gloo+mirrored", 2, True, ["contract"], False),
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
