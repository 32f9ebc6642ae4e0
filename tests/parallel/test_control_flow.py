"""Control flow and derivatives on every engine: what is found is what docs/control-flow.md says."""

import pytest

from tests.control_flow_table import constructs
from tests.derivatives import differences
from tests.parallel.conftest import ENGINE

LAYERS = ["SyncBatchNormalization", "SyncCentering"]


@pytest.mark.parametrize(
    ("layer", "graph", "construct"),
    [
        (layer, graph, name)
        for layer in LAYERS
        for graph in (True, False)
        for name in constructs(layer, graph)
    ],
)
def test_control_flow_gives_what_the_table_says(replicas, layer, graph, construct):
    assert not differences(replicas, ENGINE, layer, construct, graph)
