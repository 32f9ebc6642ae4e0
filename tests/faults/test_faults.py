"""The whole campaign: each fault under each launcher. `make test-faults` writes docs/faults.md."""

import pytest

from tests.faults import campaign


@pytest.mark.parametrize("fault", campaign.SAYS)
@pytest.mark.parametrize("launcher", campaign.LAUNCHERS)
def test_a_fault_ends_the_job_or_the_job_goes_on(launcher, fault, tmp_path, record):
    outcome = campaign.run(launcher, fault, tmp_path)
    record(launcher, fault, outcome)
    assert not campaign.wrong_with(launcher, fault, outcome), outcome.output
