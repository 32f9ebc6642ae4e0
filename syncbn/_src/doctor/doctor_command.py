"""``syncbn doctor``: describes the machine, tries the engines, and prints both."""

from __future__ import annotations

import argparse
import json
import sys

from syncbn._src.communicators.launcher import launched
from syncbn._src.doctor import engines
from syncbn._src.terminal import BAD, DOUBTFUL, GOOD, HEADING, show

_STYLES = {r"^\S.*?(?=  )": HEADING}
_VERDICTS = {"^ok": GOOD, "^failed": BAD, "^not installed": DOUBTFUL}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``doctor``."""
    parser.add_argument(
        "--engine",
        action="append",
        choices=list(engines.ENGINES),
        help="try this one only, which then has to work; may be given several times",
    )
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="how long an engine may take before its processes are ended (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, at the end")


def run(arguments: argparse.Namespace) -> int:
    """Describes the machine, tries the engines, and prints both.

    Returns:
        0 where all engines that are installed work, 1 where one does not, or one that was asked for
        is not installed, and 2 where a launcher started this process.
    """
    launch = launched()
    if launch.processes > 1 and launch.variable != "TF_CONFIG":
        print(
            "The doctor starts processes of its own, so a launcher must not start it. Received: "
            f"{launch.variable}={launch.processes}. Run it once, by itself.",
            file=sys.stderr,
        )
        return 2
    from syncbn._src.doctor import examine  # which imports TensorFlow

    machine = examine.describe_machine()
    width = max(map(len, (*machine, *engines.ENGINES)))
    if not arguments.json:
        for what, text in machine.items():
            show(f"{what:{width}}  {text}", _STYLES)
        show("\nOn CPUs, between two replicas: an all-reduce, a training step, the latency", {})
    results = []
    for engine in arguments.engine or engines.ENGINES:
        if not arguments.json:
            show(f"{engine:{width}}  ", _STYLES, end="")
        results.append(examine.try_out(engine, arguments.limit))
        if not arguments.json:
            show(results[-1], _VERDICTS)
    if arguments.json:
        print(json.dumps({"machine": machine, "engines": [r._asdict() for r in results]}, indent=2))
    wrong = ("failed", "missing") if arguments.engine else ("failed",)
    return int(any(result.status in wrong for result in results))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"must be a positive number of seconds. Received: {text!r}"
        )
    return seconds
