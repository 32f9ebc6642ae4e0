"""Sessions of TensorFlow 1: `tests/sessions` in processes of their own, and what is refused."""

import re
import sys

import pytest

from tests import processes

SUITE = [sys.executable, "-m", "pytest", "--color=no", "-q", "-p", "no:cacheprovider"]


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("v2 behavior off", 1),
        ("a graph of its own", 1),
        ("eager execution off", 2),
    ],
)
def test_the_suite_passes_with(mode, size):
    command = [*SUITE, "tests/sessions"]
    if size > 1:
        command = processes.horovodrun(size, "gloo", *command)
    finished = processes.run(
        [(mode, command, {})],
        takes=30,
        env={
            "SYNCBN_TEST_SESSION": mode,
            "SYNCBN_TEST_ENGINE": "local" if size == 1 else "horovod",
            "TF_USE_LEGACY_KERAS": "1",
        },
    )
    assert finished.code == 0, finished.output
    passed = re.findall(r"\d+ passed", processes.unwoven(finished.output))
    assert len(passed) == size, finished.output


def test_mpi_refuses_a_session():
    command = processes.mpirun(2, *processes.program("mpi_in_a_session"))
    finished = processes.run([("mpirun", command, {})], env={"TF_USE_LEGACY_KERAS": "1"})
    assert finished.code == 0, finished.output


def test_keras_3_refuses_a_session():
    command = processes.program("keras_3_in_a_session")
    finished = processes.run([("python", command, {"TF_USE_LEGACY_KERAS": "0"})])
    assert finished.code == 0, finished.output
