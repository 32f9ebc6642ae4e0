"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case
from benchmarks.measuring import jobs, machine, presentation

REPEATS, QUICK_REPEATS = 40, 8
ROUNDS = 3
"""How often jobs take turns, where a case compares contestants in several jobs."""
LIMIT = 900.0
"""Seconds that a job may take."""


def positive(text: str) -> int:
    """Parses a positive integer."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be positive. Received: {text}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument(
        "--case", metavar="NAME", help="what to measure (see --list); default: all", **several
    )
    parser.add_argument(
        "--engine", choices=jobs.ENGINES, help="only cases with one of these", **several
    )
    parser.add_argument(
        "--workers", metavar="N", type=positive, help="only cases with this many workers", **several
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few measurements, and without --case, --engine and --workers only the cases that "
        "have a target",
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=positive,
        help=f"measured steps of each contestant in a job; default: {REPEATS}, quick: "
        f"{QUICK_REPEATS}",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("build/benchmarks"),
        help="where benchmarks.json, benchmarks.md and the pictures go; default: %(default)s",
    )
    parser.add_argument("--list", action="store_true", help="list the cases, and exit")


def chosen(given: argparse.Namespace) -> dict[str, Case]:
    """Returns the cases that the options name.

    Raises:
        ValueError: there is no such case.
    """
    unknown = [name for name in given.case or () if name not in CASES]
    if unknown:
        raise ValueError(
            f"--case must name cases that --list shows. Received: {', '.join(unknown)}"
        )
    only_targets = given.quick and not (given.case or given.engine or given.workers)
    cases = {
        name: case
        for name, case in CASES.items()
        if (not given.case or name in given.case)
        and (not given.engine or set(given.engine) & set(case.engines))
        and (not given.workers or case.workers in given.workers)
        and (case.has_target or not only_targets)
    }
    if not cases:
        raise ValueError("--case, --engine and --workers must leave a case. Received: none left")
    return cases


def run(given: argparse.Namespace) -> int:
    """Measures and reports.

    Returns:
        0; 1 where a job failed, 2 where the options are wrong.
    """
    try:
        cases = chosen(given)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if given.list:
        width = max(map(len, cases))
        for name, case in cases.items():
            print(f"{name:{width}}  {case.summary}")
        return 0
    if importlib.util.find_spec("matplotlib") is None:
        say("The pictures need matplotlib: pip install 'syncbn[demo]'")
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # ending the job first
    repeats = given.repeats or (QUICK_REPEATS if given.quick else REPEATS)
    settings = {
        "measured steps in a job": str(repeats),
        "time of a step": "on the first worker, from when all have met until it has its results",
        "threads of TensorFlow": "in each process its share of the cores (TF_NUM_INTRAOP_THREADS)",
        "load at the beginning": machine.load(),
    }
    found: dict[str, Any] = {"machine": machine.describe(), "settings": settings, "cases": {}}
    for number, (name, case) in enumerate(cases.items(), 1):
        label = f"[{number}/{len(cases)}] {name}"
        found["cases"][name] = measure(label, case, repeats, 1 if given.quick else ROUNDS)
        settings["load at the end"] = machine.load()
        presentation.write(found, given.out)  # each time, as a long run may be aborted
    print(presentation.markdown(found))
    say(f"Written to {given.out}")
    return int(any(case["failures"] for case in found["cases"].values()))


def measure(label: str, case: Case, repeats: int, most_rounds: int) -> dict[str, Any]:
    """Returns the results of a case; its jobs take turns, and those that fail are not repeated."""
    left_out, failures, able = [], [], []
    for job in jobs.jobs_of(case):
        missing = jobs.missing(job.engine, job.keras)
        if missing:
            left_out.append(f"{', '.join(job.layers)} ({missing})")
            say(f"{label}: left out: {left_out[-1]}")
        else:
            able.append(job)
    job_of = {name: job for job in able for name in job.layers}
    # Contestants of one job meet the same disturbances anyway.
    apart = any(job_of.get(ours) is not job_of.get(peer) for ours, peer in case.ratios)
    rounds = most_rounds if apart else 1
    samples: list[dict[str, list[list[float]]]] = [{} for _ in case.points]
    for number in range(1, rounds + 1):
        for job in list(able):
            what = f"{label}, round {number}/{rounds}: {', '.join(job.layers)} ({job})"
            say(what)
            begin = time.monotonic()

            def tell(done: int, begin: float = begin) -> None:
                seconds = time.monotonic() - begin
                say(f"    {done}/{len(case.points)} {case.points[done - 1]}, {seconds:.0f} s")

            try:
                results = jobs.run(job, case, repeats, LIMIT, tell)
            except jobs.JobError as error:
                say(f"    failed: {error}")
                failures.append(f"{what}: {error}")
                able.remove(job)
                continue
            for of_point, values in zip(samples, results, strict=True):
                for name, one in values.items():
                    of_point.setdefault(name, []).append(one)
    points = [
        presentation.results_of(case, point, of_point)
        for point, of_point in zip(case.points, samples, strict=True)
        if of_point
    ]
    return {
        "summary": case.summary,
        "unit": case.unit,
        "points": points,
        "left_out": left_out,
        "failures": failures,
    }


def say(text: str) -> None:
    """Reports progress."""
    print(text, file=sys.stderr, flush=True)
