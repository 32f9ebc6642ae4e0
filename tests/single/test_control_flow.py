"""Control flow and derivatives on one replica, ours and the plain layer's."""

import pytest

from tests import replicas as kinds
from tests.control_flow import CONSTRUCTS
from tests.control_flow_table import PAGE, REFUSALS, constructs, page, refusal
from tests.derivatives import KINDS, differences, find
from tests.keras import KERAS_3

LAYERS = ["SyncBatchNormalization", "SyncCentering"]
# Of these constructs Keras knows something; the others are tried with Keras 3.
OF_KERAS = ["none", "training=tensor", "RNN"]
ONE = kinds.Process(0, 1)


@pytest.mark.parametrize(
    ("layer", "graph", "construct"),
    [
        (layer, graph, name)
        for layer in LAYERS
        for graph in (True, False)
        for name in constructs(layer, graph)
        if KERAS_3 or name in OF_KERAS
    ],
)
def test_control_flow_gives_what_the_table_says(layer, graph, construct):
    assert not differences(ONE, "local", layer, construct, graph)


@pytest.mark.skipif(not KERAS_3, reason="what TensorFlow refuses, it refuses under either Keras")
@pytest.mark.parametrize("refused", [r for r in REFUSALS if r.plain], ids=lambda r: r.sentence)
def test_where_tensorflow_is_said_to_refuse_the_plain_layer_it_does(refused):
    cells = [
        (name, kind)
        for name in CONSTRUCTS
        for kind in KINDS
        if refusal("local", name, kind, True) is refused
    ]
    # Pairs where nothing else has it: those of a kind fail alike.
    for name, kind in [cell for cell in cells if " in " not in cell[0]] or cells:
        assert refused.sentence in find(ONE, "BatchNormalization", name, kind, True), (name, kind)


def test_the_page_is_the_table():
    assert PAGE.read_text() == page(), "run python -m tests.control_flow_table"
