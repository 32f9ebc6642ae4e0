"""Fixtures of the tests with other packages' models, which `make test-clients` runs."""

import pytest

from tests import replicas


@pytest.fixture(scope="session")
def two_replicas():
    replicas.use_logical_devices(2)
    return replicas.mirrored(2).strategy
