"""``syncbn report``: what synchronization costs a model, on the command line."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from syncbn._src.named_functions import named_function
from syncbn._src.terminal import DOUBTFUL, HEADING, show

if TYPE_CHECKING:
    from syncbn._src.models.communication_report import LayerReport, Report

_STYLES = {
    r"^layer .*": HEADING,
    r"(?m)^total .*": HEADING,
    "not synchronized|not a layer of syncbn": DOUBTFUL,
    r"(?m)^- .*": DOUBTFUL,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``report``."""
    parser.add_argument(
        "build_model", metavar="module:function", help="a function that returns the model"
    )
    parser.add_argument(
        "--communicator",
        metavar="auto",
        help="also measure what a step waits for: auto, tf.distribute, horovod or mpi; on all "
        "workers of a job, of which the first prints",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report of a model.

    Returns:
        0.

    Raises:
        UsageError: what the arguments name does not exist.
    """
    from syncbn._src.models.communication_report import report
    from syncbn._src.models.training_job import job_of

    model = named_function(arguments.build_model)()
    found = report(model, arguments.communicator)
    first = arguments.communicator is None or 0 in job_of(model, arguments.communicator).ranks
    if first and arguments.json:
        print(json.dumps(_as_json(found), indent=2))
    elif first:
        show(found, _STYLES)
    return 0


def _as_json(found: Report) -> dict[str, Any]:
    rows = [_row(layer) for layer in (*found.layers, found.total)]
    return {**found._asdict(), "layers": rows[:-1], "total": rows[-1]}


def _row(layer: LayerReport) -> dict[str, Any]:
    payloads = {
        way: [payload._asdict() for payload in getattr(layer, way)]
        for way in ("forward", "backward")
    }
    return {
        **layer._asdict(),
        **payloads,
        "collectives": layer.collectives,
        "bytes": layer.bytes,
    }
