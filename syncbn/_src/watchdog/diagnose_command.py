"""``syncbn diagnose``: what the records of a job's ranks say together."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn._src.terminal import HEADING, show
from syncbn._src.text_tables import aligned
from syncbn._src.watchdog.messages import call_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``diagnose``."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="syncbn-record-*.json of one job"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of the ranks, and a sentence; returns 2 where a file is no record."""
    records = []
    for file in arguments.files:
        try:
            record = json.loads(file.read_text())
            records.append({key: record[key] for key in _KEYS})
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            print(f"diagnose needs records of ranks. Received: {file} ({reason})", file=sys.stderr)
            return 2
    records.sort(key=lambda record: record["rank"])
    if len({record["rank"] for record in records}) < len(records):
        print("diagnose needs one record of each rank. Received: several of one", file=sys.stderr)
        return 2
    show(_table(records), {"^rank .*": HEADING})
    show(f"\n{_sentence(records)}", {})
    return 0


_KEYS = (
    *("rank", "size", "engine", "host", "pid", "time", "reason"),
    *("waiting", "stack", "collectives", "sites"),
)


def _table(records: Sequence[dict[str, Any]]) -> str:
    rows = [("rank", "process", "waits in", "for", "last done", "at")]
    for record in records:
        waiting = record["waiting"]
        rows.append(
            (
                str(record["rank"]),
                f"{record['pid']} on {record['host']}",
                call_text(waiting["name"], waiting["call"]) if waiting else "no collective",
                f"{record['time'] - waiting['since']:.0f} s" if waiting else "",
                _last_done(record),
                _place(record["stack"]),
            )
        )
    return "\n".join(aligned(rows))


def _last_done(record: dict[str, Any]) -> str:
    done = [one for one in record["collectives"] if one["left"] is not None]
    if done:
        return call_text(done[-1]["name"], done[-1]["number"])
    # Of those of a graph only their numbers are known.
    counts = {site["name"]: site["left"] for site in record["sites"]}
    return ", ".join(f"{name} x {count}" for name, count in list(counts.items())[:2])


def _place(stack: str) -> str:
    """Returns the innermost line of a stack that is not one of an installed package."""
    lines = [line.strip() for line in stack.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "site-packages" not in line] or lines
    if not own:
        return ""
    _, _, rest = own[-1].partition('"')
    path, _, rest = rest.partition('"')
    number = rest.partition("line ")[2].partition(",")[0]
    return f"{path}:{number}"


def _sentence(records: Sequence[dict[str, Any]]) -> str:
    size = max(record["size"] for record in records)
    silent = sorted(set(range(size)) - {record["rank"] for record in records})
    words = []
    if silent:
        words.append(
            f"There is no record of rank {', '.join(map(str, silent))}: look for what ended it"
        )
    calls: dict[tuple[str, int] | None, list[int]] = {}
    for record in records:
        waiting = record["waiting"]
        call = (waiting["name"], waiting["call"]) if waiting else None
        calls.setdefault(call, []).append(record["rank"])
    if len(calls) > 1:
        words += [
            f"rank {', '.join(map(str, ranks))} "
            + ("is in no collective" if call is None else f"waits in {call_text(*call)}")
            for call, ranks in calls.items()
        ]
    elif not silent:
        words.append("All ranks are at the same call")
    return "; ".join(words) + f". The job ended because {records[0]['reason']}."
