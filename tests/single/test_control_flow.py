"""Control flow and derivatives on one replica, ours and the plain layer's."""

import json

import pytest

from tests import kinds_of_replicas as kinds
from tests.control_flow import CONSTRUCTS, FAMILIES, SINGLE
from tests.control_flow_table import (
    ASKED,
    ENGINES,
    KINDS,
    LAYERS,
    PAGE,
    RUNS,
    cells,
    chosen,
    count,
    page,
    plain_in_ci,
    refusal,
    refused_to_plain_layers,
    to_test,
)
from tests.derivatives import find, unlike
from tests.keras import KERAS_3

# Of these constructs Keras knows something; the others are tried with Keras 3.
OF_KERAS = ["none", "training=tensor", "RNN"]
ONE = kinds.Process(0, 1)


@pytest.mark.parametrize(
    "cell", [cell for cell in to_test("local") if KERAS_3 or cell.construct in OF_KERAS], ids=str
)
def test_control_flow_gives_what_the_table_says(cell):
    assert not unlike(ONE, cell, refusal("local", cell))


@pytest.mark.skipif(not KERAS_3, reason="what TensorFlow refuses, it refuses under either Keras")
@pytest.mark.parametrize(
    ("cell", "sentences"), refused_to_plain_layers() if ASKED else plain_in_ci(), ids=str
)
def test_where_tensorflow_is_said_to_refuse_the_plain_layer_it_does(cell, sentences):
    found = find(ONE, cell)
    assert any(sentence in found for sentence in sentences), found


def test_every_family_of_constructs_is_in_every_other():
    # But nothing is in a call, to which the outer construct would have to give its `training`.
    for outer in (names for family, names in FAMILIES.items() if family != "calls"):
        for inner in FAMILIES.values():
            assert CONSTRUCTS.keys() & {f"{a} in {b}" for a in inner for b in outer}, (inner, outer)
    assert {*SINGLE} == {name for family in FAMILIES.values() for name in family}


@pytest.mark.parametrize("engine", ENGINES)
def test_each_construct_and_each_kind_is_chosen_on_each_engine(engine):
    few = chosen(engine)
    assert {*few} < {*cells(engine)}
    assert {c.construct for c in few} >= {*SINGLE}
    assert {(c.layer, c.kind) for c in few} == {(layer, kind) for layer in LAYERS for kind in KINDS}


def test_each_construct_is_chosen_with_each_kind_and_each_pair_on_an_engine_that_ci_runs():
    few = [cell for engine in ENGINES if "+" not in engine for cell in chosen(engine)]
    assert {(c.construct, c.kind) for c in few} >= {(name, k) for name in SINGLE for k in KINDS}
    assert {c.construct for c in few} >= {name for name in CONSTRUCTS if " in " in name}


def test_the_page_is_the_table():
    assert PAGE.read_text() == page(), "run python -m tests.control_flow_table"


def test_as_many_cells_were_tested_as_there_are():
    for engine, families in json.loads(RUNS.read_text()).items():
        for family, run in families.items():
            assert run["cells"] == count(engine, family), (
                f"run make test-control-flow ENGINES={engine}:{family}"
            )
