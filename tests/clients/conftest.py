"""Fixtures of the tests with other packages' models, which `make test-clients` runs."""

import pytest

from tests import kinds_of_replicas as kinds


@pytest.fixture(scope="session")
def two_replicas():
    kinds.use_logical_devices(2)
    return kinds.mirrored(2).strategy
