"""Control flow and derivatives on every engine: what is found is what docs/control-flow.md says."""

import faulthandler
import json
import os

import pytest

from tests.control_flow import CONSTRUCTS
from tests.derivatives import KINDS, LAYERS, find

SURVEY = os.environ.get("SYNCBN_SURVEY")

CELLS = [
    (layer, mode, kind, name)
    for layer in LAYERS
    for name in CONSTRUCTS
    for mode in ("graph", "eager")
    for kind in KINDS
]


@pytest.mark.skipif(not SURVEY, reason="SYNCBN_SURVEY is not set")
def test_survey(replicas):
    """Writes what is; not a test."""
    rank = getattr(replicas, "rank", None)
    if rank is None:
        rank = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
    only = os.environ.get("SYNCBN_SURVEY_ONLY", "").split(",")
    path = f"{SURVEY}.{rank}.jsonl"
    with open(f"{SURVEY}.skip") as file:
        done = {tuple(json.loads(line)["cell"]) for line in file}
    for cell in CELLS:
        layer, mode, kind, name = cell
        text = "/".join(cell)
        if cell in done or not all(w[1:] not in text if w[:1] == "-" else w in text for w in only):
            continue
        if layer == "BatchNormalization" and replicas.size > 1:
            continue
        with open(path, "a") as file:
            file.write(json.dumps({"cell": cell, "start": True}) + "\n")
        faulthandler.dump_traceback_later(25, exit=True)
        found = find(replicas, layer, name, kind, mode == "graph")
        faulthandler.cancel_dump_traceback_later()
        with open(path, "a") as file:
            file.write(json.dumps({"cell": cell, "found": found}) + "\n")
