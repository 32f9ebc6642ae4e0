"""The whole campaign: each fault under each launcher. It writes docs/faults.md."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import campaign


@pytest.mark.parametrize("case", campaign.CASES, ids=str)
@pytest.mark.parametrize("launcher", campaign.LAUNCHERS)
def test_a_fault_ends_the_job_or_the_job_goes_on(launcher, case, tmp_path, record):
    outcome = campaign.run(launcher, case, tmp_path)
    record(launcher, case, outcome)
    assert not campaign.wrong_with(case, outcome), outcome.output


@pytest.mark.parametrize("launcher", campaign.LAUNCHERS)
def test_a_job_does_not_notice_what_befalls_another_on_its_machine(launcher, tmp_path):
    cases = [campaign.Case("none"), campaign.Case("is killed")]
    folders = [tmp_path / case.fault for case in cases]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(len(cases)) as pool:
        outcomes = list(pool.map(campaign.run, [launcher] * len(cases), cases, folders))
    for case, outcome in zip(cases, outcomes, strict=True):
        assert not campaign.wrong_with(case, outcome), outcome.output
