"""The hard limits of tests, and what multiplies them."""

import sys

import pytest

from tests import patience, processes


@pytest.mark.parametrize(
    ("given", "takes", "seconds"),
    [(None, 1, 120), (None, 12, 120), (None, 30, 300), ("3", 1, 360), ("0.5", 30, 150)],
)
def test_a_limit_is_ten_times_what_it_takes_and_two_minutes_at_least(
    given, takes, seconds, monkeypatch
):
    monkeypatch.delenv(patience.VARIABLE, raising=False)
    if given:
        monkeypatch.setenv(patience.VARIABLE, given)
    assert patience.limit(takes) == seconds


@pytest.mark.parametrize("given", ["x", "", "0", "-1", "nan", "inf"])
def test_no_positive_number_is_an_error_before_the_first_test(given):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/launchers"]
    finished = processes.run([("pytest", command, {patience.VARIABLE: given})])
    assert finished.code == pytest.ExitCode.USAGE_ERROR, finished.output
    message = f"SYNCBN_TEST_PATIENCE must be a positive number. Received: {given!r}"
    assert message in finished.output, finished.output


def test_what_hangs_is_ended_and_a_rank_knows_of_it_before(monkeypatch):
    code = (
        "import os, time\n"
        "print('rank ends after', os.environ['SYNCBN_TEST_LIMIT'], flush=True)\n"
        "time.sleep(600)"
    )
    monkeypatch.setenv(patience.VARIABLE, "0.05")  # of 120 s
    finished = processes.python(code)
    assert finished.code == 124, finished.output
    assert "ended after the limit of 6 s" in finished.output, finished.output
    assert "rank ends after 5.4" in finished.output, finished.output


def test_processes_inherit_it(monkeypatch):
    monkeypatch.setenv(patience.VARIABLE, "7")
    monkeypatch.setenv("SYNCBN_TEST_ENGINE", "mpi")
    kept = {k: v for k, v in processes.environment().items() if k.startswith("SYNCBN_TEST")}
    assert kept == {patience.VARIABLE: "7"}
