"""Writes what the campaign has found into a page of the documents."""

import pytest

from tests.faults import page


@pytest.fixture(scope="session")
def record():
    found = {}
    yield lambda launcher, case, outcome: found.update({(launcher, case): outcome})
    page.write(found)
