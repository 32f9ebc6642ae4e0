"""The measurements as JSON, as Markdown and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Point
from benchmarks.measuring.timing import summary

UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6, "MB": 1e-6}
"""The number of each in a second, or in a byte."""


def results_of(
    case: Case, point: Point, rounds: dict[str, list[list[float]]]
) -> dict[str, list[dict[str, Any]]]:
    """Returns the results and ratios of one point.

    Args:
        case: The case that was measured.
        point: One of its points.
        rounds: By contestant, for each round the seconds or bytes.
    """
    scale = UNITS[case.unit]
    summaries = {
        name: summary([[scale * value for value in one] for one in values])
        for name, values in rounds.items()
    }
    results = [
        {"who": name, **one._asdict(), "rounds": len(rounds[name])}
        for name, one in summaries.items()
    ]
    ratios = []
    for ours, peer in case.ratios:
        if ours in summaries and peer in summaries:
            ratio = summaries[ours].median / summaries[peer].median
            at_most = point.at_most.get(peer)
            reached = None if at_most is None else ratio <= at_most
            ratios.append(
                {"ours": ours, "peer": peer, "ratio": ratio, "at_most": at_most, "reached": reached}
            )
    return {"point": str(point), "results": results, "ratios": ratios}


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes ``benchmarks.json``, ``benchmarks.md`` and a picture for each case."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "benchmarks.json").write_text(f"{text}\n")
    (folder / "benchmarks.md").write_text(markdown(report))
    for name, case in report["cases"].items():
        if case["points"]:
            draw_case(name, case, folder / f"{name}.png")


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as a page."""
    lines = ["# Benchmarks", ""]
    lines += [f"- {key}: {value}" for key, value in report["machine"].items()]
    lines += [f"- {key}: {value}" for key, value in report["settings"].items()]
    targets = [
        f"| {name} | {point['point']} | {one['ours']} / {one['peer']} | {one['ratio']:.2f} "
        f"| {one['at_most']:.2f} | {_yes(one['reached'])} |"
        for name, case in report["cases"].items()
        for point in case["points"]
        for one in point["ratios"]
        if one["at_most"] is not None
    ]
    if targets:
        lines += ["", "## Against the targets", ""]
        lines += ["| case | what | ratio of medians | is | at most | reached |", _rule(6), *targets]
    for name, case in report["cases"].items():
        sentence = case["summary"]
        lines += ["", f"## {name}", "", f"{sentence[0].upper()}{sentence[1:]}.", ""]
        if case["points"]:
            heads = f"median, {case['unit']} | quartiles | samples"
            lines += [f"| | | {heads} | ours / theirs | at most | reached |", _rule(8)]
            for point in case["points"]:
                lines += _rows(point)
            lines += ["", f"![{name}]({name}.png)"]
        lines += [f"- Left out: {line}" for line in case["left_out"]]
        for failure in case["failures"]:
            lines += ["", "Failed:", "", "```", failure, "```"]
    return "\n".join(lines) + "\n"


def _rows(point: dict[str, Any]) -> list[str]:
    ratios = {one["peer"]: one for one in point["ratios"]}
    rows = []
    for one in point["results"]:
        cells = [
            point["point"],
            one["who"],
            f"{one['median']:.2f}",
            f"{one['lower']:.2f} to {one['upper']:.2f}",
            f"{one['samples']} in {one['rounds']}",
        ]
        ratio = ratios.get(one["who"])
        cells.append(f"{ratio['ratio']:.2f} ({ratio['ours']})" if ratio else "")
        bound = ratio and ratio["at_most"] is not None
        cells += [f"{ratio['at_most']:.2f}", _yes(ratio["reached"])] if bound else ["", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def draw_case(name: str, case: dict[str, Any], file: Path) -> None:
    """Draws medians and quartiles of each contestant at each point."""
    from matplotlib.figure import Figure

    results = [one for point in case["points"] for one in point["results"]]
    names = list(dict.fromkeys(one["who"] for one in results))
    points, step = len(case["points"]), 1 / (len(names) + 2)
    figure = Figure((8, 1.8 + 0.16 * (points + 1) * (len(names) + 2)), layout="constrained")
    axes = figure.subplots()
    for index, who in enumerate(names):
        places, medians, spread = [], [], []
        for place, point in enumerate(case["points"]):
            for one in point["results"]:
                if one["who"] == who:
                    places.append(place + step * (index - (len(names) - 1) / 2))
                    medians.append(one["median"])
                    # A median of rounds need not lie between the quartiles of all measurements.
                    below, above = one["median"] - one["lower"], one["upper"] - one["median"]
                    spread.append((max(0, below), max(0, above)))
        errors = list(zip(*spread, strict=True))
        axes.errorbar(medians, places, xerr=errors, fmt="o", ms=4, lw=1, label=who)
    axes.set_yticks(range(points), [point["point"] for point in case["points"]])
    axes.set_ylim(points - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.2)
    if all(one["lower"] > 0 for one in results):
        axes.set_xscale("log")  # a case's points are far apart
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"median and quartiles, {case['unit']}")
    axes.set_title(f"{name}: {case['summary']}", fontsize="small", wrap=True)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=120)
