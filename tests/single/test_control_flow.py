"""Control flow and derivatives on one replica, ours and the plain layer's."""

import json

import pytest

from tests import replicas as kinds
from tests.control_flow import CONSTRUCTS, FAMILIES, SINGLE
from tests.control_flow_table import (
    ALL,
    ENGINES,
    KINDS,
    LAYERS,
    PAGE,
    RUNS,
    cells,
    chosen,
    page,
    refusal,
    refused_to_plain_layers,
    tested,
)
from tests.derivatives import unlike
from tests.keras import KERAS_3

# Of these constructs Keras knows something; the others are tried with Keras 3.
OF_KERAS = ["none", "training=tensor", "RNN"]
ONE = kinds.Process(0, 1)


def refused():
    """Without the pairs, where not all cells are tested and others are refused alike."""
    found = refused_to_plain_layers()
    alone = [said for cell, said in found if " in " not in cell.construct]
    return [(cell, r) for cell, r in found if ALL or " in " not in cell.construct or r not in alone]


@pytest.mark.parametrize(
    "cell", [cell for cell in tested("local") if KERAS_3 or cell.construct in OF_KERAS], ids=str
)
def test_a_cell_is_what_the_table_says(cell):
    said = refusal("local", cell.construct, cell.kind, cell.graph)
    assert not unlike(ONE, cell, said)


@pytest.mark.skipif(not KERAS_3, reason="what TensorFlow refuses, it refuses under either Keras")
@pytest.mark.parametrize(("cell", "said"), refused(), ids=str)
def test_where_tensorflow_is_said_to_refuse_the_plain_layer_it_does(cell, said):
    assert not unlike(ONE, cell, said)


def test_every_family_of_constructs_is_in_every_other():
    # But nothing is in "training=tensor", which gives the inner call a `training`.
    for outer in (family for family in FAMILIES.values() if family != ("training=tensor",)):
        for inner in FAMILIES.values():
            assert CONSTRUCTS.keys() & {f"{a} in {b}" for a in inner for b in outer}, (inner, outer)
    assert {"none", *(name for family in FAMILIES.values() for name in family)} == {*SINGLE}


@pytest.mark.parametrize("engine", ENGINES)
def test_each_construct_and_each_kind_is_chosen_on_each_engine(engine):
    few = chosen(engine)
    assert {*few} < {*cells(engine)}
    assert {(c.construct, c.kind) for c in few} >= {(name, k) for name in SINGLE for k in KINDS}
    assert {(c.layer, c.kind) for c in few} == {(layer, kind) for layer in LAYERS for kind in KINDS}


def test_each_pair_is_chosen_on_several_engines():
    pairs = [c.construct for e in ENGINES for c in chosen(e) if " in " in c.construct]
    assert min(pairs.count(name) for name in CONSTRUCTS if " in " in name) >= 3


def test_the_page_is_the_table():
    assert PAGE.read_text() == page(), "run python -m tests.control_flow_table"


def test_every_cell_was_tested():
    number = {engine: len(cells(engine)) for engine in ENGINES}
    number["local"] += len(refused_to_plain_layers())
    ran = {engine: run["cells"] for engine, run in json.loads(RUNS.read_text()).items()}
    assert ran == number, "run make test-control-flow"
