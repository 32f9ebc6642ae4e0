"""What synchronization adds to a step of ResNet-50 over MPI, with up to 1,024 workers."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring import jobs
from benchmarks.measuring.command import positive, say
from benchmarks.studies import all_reduce
from benchmarks.studies.cost_model import Point, error, fit, measured
from syncbn._src.models.network_costs import ALGORITHMS, Costs, Network, added, network, terms

HELD_OUT = (8, 1025)
"""Workers and length of the points that the fit does not see; chosen before the first fit."""
ASSUMED = {
    "InfiniBand, 100 Gbit/s (assumed)": network(2e-6, 1 / 12.5e9),
    "TCP, 25 Gbit/s (assumed)": network(20e-6, 1 / 3e9),
}
"""Not measured: the orders of magnitude of such networks."""
WORKERS = tuple(2**power for power in range(1, 11))
SHOWN = (2, 8, 16, 64, 256, 1024)
GROUPS = (8, 16, 32)
CALL = 39.0
"""Microseconds. Half of what ``python -m benchmarks --case target-latency`` says that a layer adds,
without the all-reduce: the median of three runs."""
ROUNDS = 5
FOLDER = Path("build/benchmarks")


class Fitted(NamedTuple):
    """An algorithm's costs, and how far they are off."""

    costs: Costs
    """Fitted to all points but the one held out."""
    errors: np.ndarray
    """Absolute values of the relative errors, for the points that were fitted."""
    held_out: Point
    errors_of_most: np.ndarray
    """The same for the points with the most workers, in a fit to all others."""


def fitted(found: dict[str, Any]) -> dict[str, Fitted]:
    """Returns the fits to the measurements, by algorithm."""
    cores = found["cores"]

    def errors(costs: Costs, points: list[Point]) -> np.ndarray:
        return np.abs([error(costs, point, cores) for point in points])

    results = {}
    for algorithm in ALGORITHMS:
        points = [point for point in found["points"] if point["algorithm"] == algorithm]
        (held_out,) = [p for p in points if (p["workers"], p["length"]) == HELD_OUT]
        seen = [point for point in points if point is not held_out]
        most = [point for point in points if point["workers"] == max(all_reduce.WORKERS)]
        fewer = [point for point in points if point not in most]
        costs = fit(seen, cores)
        of_most = errors(fit(fewer, cores), most)
        results[algorithm] = Fitted(costs, errors(costs, seen), held_out, of_most)
    return results


def networks(results: dict[str, Fitted]) -> dict[str, Network]:
    """Returns the network that was measured, and those that are assumed."""
    measured_here = {algorithm: one.costs for algorithm, one in results.items()}
    return {"this machine, a core for each worker": measured_here, **ASSUMED}


def scaling_page(found: dict[str, Any], channels: Sequence[int], call: float) -> str:
    """Returns the results as tables.

    Args:
        found: What `all_reduce.measure_all_reduces` returns.
        channels: The channels of each synchronized layer.
        call: Seconds in TensorFlow around each collective.
    """
    results, cores = fitted(found), found["cores"]
    lines = [f"- {key}: {value}" for key, value in found["machine"].items()]
    lines += [
        f"- all-reduces in a step: {2 * len(channels)}, with groups {3 * len(channels)}",
        f"- in TensorFlow, around each: {1e6 * call:.0f} µs",
        *_head("algorithm", "latency, µs", "wake-up, µs", "handshake, µs", "GB/s", "error of fit"),
    ]
    for name, one in results.items():
        costs = one.costs
        times = [f"{1e6 * s:.2f}" for s in (costs.latency, costs.wake_up, costs.handshake)]
        bandwidth = f"{1e-9 / costs.byte:.1f}" if costs.byte else "any"
        lines.append(_row(name, *times, bandwidth, _spread(one.errors)))
    workers, length = HELD_OUT
    point = f"{workers} workers, {length:,} numbers, held out"
    most = f"{max(all_reduce.WORKERS)} workers, from a fit to fewer: error"
    lines += _head("algorithm", f"{point}: measured, µs", "model, µs", "error", most)
    for name, one in results.items():
        time, off = 1e6 * measured(one.held_out), error(one.costs, one.held_out, cores)
        cells = [f"{time:.1f}", f"{time * (1 + off):.1f}", f"{off:+.0%}"]
        lines.append(_row(name, *cells, _spread(one.errors_of_most)))
    heads = [f"{workers:,} workers" for workers in SHOWN]
    lines += _head("ms added by", *heads, "faster than no groups from")
    for name, costs in networks(results).items():
        for group in (None, *GROUPS):
            times = {n: added(costs, channels, n, group, call) for n in WORKERS}
            faster = [n for n in WORKERS if times[n] < added(costs, channels, n, None, call)]
            start = f"{min(faster):,} workers" if faster else "nowhere here" if group else ""
            label = f"{name}, groups of {group}" if group else name
            lines.append(_row(label, *(f"{1e3 * times[n]:.1f}" for n in SHOWN), start))
    return "\n".join(lines) + "\n"


def _head(*cells: str) -> list[str]:
    return ["", _row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(errors: np.ndarray) -> str:
    return f"{np.median(errors):.0%}, at most {errors.max():.0%}"


def draw_scaling(found: dict[str, Any], channels: Sequence[int], call: float, file: Path) -> None:
    """Draws the measurements with the model, and what is added to a step; arguments as above."""
    from matplotlib.figure import Figure

    results = fitted(found)
    figure = Figure((12.5, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_measurements(left, found, results)
    _draw_added(right, networks(results), channels, call)
    for axes in (left, right):
        axes.grid(which="both", alpha=0.15)
    figure.savefig(file, dpi=110)


def _draw_measurements(axes: Any, found: dict[str, Any], results: dict[str, Fitted]) -> None:
    from matplotlib.lines import Line2D

    looks = dict(zip(ALGORITHMS, (("o", "-"), ("s", "--"), ("^", ":")), strict=True))
    colors = {workers: f"C{number}" for number, workers in enumerate(all_reduce.WORKERS)}
    for point in found["points"]:
        marker, color = looks[point["algorithm"]][0], colors[point["workers"]]
        axes.plot(8 * point["length"], 1e6 * measured(point), marker, ms=4.5, color=color)
    for algorithm, one in results.items():
        for workers, color in colors.items():
            # With shorter payloads, a ring has empty parts.
            lengths = np.geomspace(max(1, workers * (algorithm == "ring")), 2**17, 300)
            times = [terms(algorithm, workers, n, found["cores"]) @ one.costs for n in lengths]
            axes.plot(8 * lengths, 1e6 * np.array(times), looks[algorithm][1], lw=1, color=color)
        held_out = (8 * one.held_out["length"], 1e6 * measured(one.held_out))
        axes.plot(*held_out, "o", ms=12, mfc="none", color="black")
    gray = {"color": "gray"}
    axes.legend(
        handles=[
            *(
                Line2D([], [], marker=m, ls=ls, label=name, **gray)
                for name, (m, ls) in looks.items()
            ),
            *(Line2D([], [], lw=3, color=c, label=f"{n} workers") for n, c in colors.items()),
            Line2D([], [], marker="o", ms=10, mfc="none", ls="", color="black", label="held out"),
        ],
        fontsize="small",
    )
    axes.set(xscale="log", yscale="log", xlabel="payload, bytes", ylabel="all-reduce, µs")
    axes.set_title(f"Measured on {found['cores']} cores (markers) and modelled (lines)")


def _draw_added(
    axes: Any, networks: dict[str, Network], channels: Sequence[int], call: float
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    lines = {None: "-", GROUPS[0]: "--", GROUPS[-1]: ":"}
    handles = []
    for number, (name, costs) in enumerate(networks.items(), len(all_reduce.WORKERS)):
        color = f"C{number}"
        handles.append(Line2D([], [], lw=3, color=color, label=name))
        for group, line in lines.items():
            times = [1e3 * added(costs, channels, workers, group, call) for workers in WORKERS]
            axes.plot(WORKERS, times, line, color=color)
    for group, line in lines.items():
        label = f"groups of {group}" if group else "no groups"
        handles.append(Line2D([], [], ls=line, color="gray", label=label))
    label = f"{2 * len(channels)} calls in TensorFlow alone"
    handles.append(axes.axhline(2e3 * len(channels) * call, color="black", lw=1, label=label))
    axes.legend(handles=handles, fontsize="small", loc="upper left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(WORKERS, [f"{workers:,}" for workers in WORKERS])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="workers", ylabel="added to a step of ResNet-50, ms")
    axes.set_ylim(top=2 * axes.get_ylim()[1])  # room for the legend
    axes.set_title(f"Modelled: {len(channels)} layers, one collective after another")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures or reads, prints the tables and draws; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.scaling",
        description="Fits a model of the all-reduce to times measured here over MPI, and prints "
        "what synchronization adds to a step of ResNet-50 with up to 1,024 workers.",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=FOLDER,
        help="where scaling.png goes; default: %(default)s",
    )
    parser.add_argument(
        "--measurements",
        metavar="FILE",
        type=Path,
        help=f"measure nothing, and read earlier ones; a run writes {FOLDER}/scaling.json",
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=positive,
        default=ROUNDS,
        help="how often each point is measured; default: %(default)s",
    )
    parser.add_argument(
        "--call",
        metavar="MICROSECONDS",
        type=float,
        default=CALL,
        help="time in TensorFlow around each all-reduce; default: %(default)g",
    )
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # ending the job first
    file = given.measurements or FOLDER / "scaling.json"
    if given.measurements is None:
        try:
            measurements = all_reduce.measure_all_reduces(given.rounds, say)
        except jobs.JobError as failure:
            say(f"scaling: {failure}")
            return 1
        FOLDER.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{json.dumps(measurements, indent=1)}\n")
    found = json.loads(file.read_text())

    from benchmarks.measuring.layer_steps import (
        resnet_50_shapes,  # not above, since TensorFlow takes seconds
    )

    channels, call = [shape[-1] for shape in resnet_50_shapes(1)], 1e-6 * given.call
    print(scaling_page(found, channels, call), end="")
    given.out.mkdir(parents=True, exist_ok=True)
    draw_scaling(found, channels, call, given.out / "scaling.png")
    say(f"Written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
