"""A part of the campaign of `tests/faults`: each engine, and each way in which a rank is missed."""

import json
import sys

import pytest

from tests import processes
from tests.faults import campaign


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        ("mpi", "raises"),
        ("mpi", "ends"),
        ("horovod-gloo", "other order eagerly"),
        ("horovod-gloo", "ends"),
        ("horovod-mpi", "is stopped"),
        ("multiworker", "ends"),
    ],
)
def test_a_fault_of_one_rank_ends_the_job_and_is_named(launcher, fault, tmp_path):
    case = campaign.Case(fault)
    outcome = campaign.run(launcher, case, tmp_path)
    assert not campaign.wrong_with(case, outcome), outcome.output


@pytest.mark.parametrize("launcher", ["mpi", "multiworker"])
def test_a_rank_that_does_not_come_is_named_with_its_stack_and_leaves_a_record(launcher, tmp_path):
    case = campaign.Case("sleeps")
    outcome = campaign.run(launcher, case, tmp_path)
    assert not campaign.wrong_with(case, outcome), outcome.output
    assert outcome.code == 70
    assert "time.sleep(1000)" in outcome.output
    files = sorted(tmp_path.glob("syncbn-record-*.json"))
    records = {record["rank"]: record for record in map(json.loads, map(_text, files))}
    assert records[0]["waiting"]["name"].endswith("syncbn/first/statistics")
    assert records[1]["waiting"] is None
    command = [sys.executable, "-m", "syncbn", "diagnose", *map(str, files)]
    diagnosed = processes.run([("diagnose", command, {})])
    assert diagnosed.code == 0, diagnosed.output
    assert "rank 1 is in no collective" in diagnosed.output


def _text(file):
    return file.read_text()
