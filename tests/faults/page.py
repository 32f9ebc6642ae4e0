"""The tables in docs/faults.md, made of what the campaign has found."""

import json

from tests import processes
from tests.faults import campaign

FILE = processes.ROOT / "docs" / "faults.md"
RUNS = processes.ROOT / "tests" / "faults" / "runs.json"
"""What has become of each job, by case and launcher, when it was run last."""
BEGIN, END = "<!-- made by make test-faults -->\n", "<!-- end -->\n"


def cell(outcome):
    """One cell of a table."""
    if outcome.code == 0:
        return f"goes on, {outcome.seconds:.0f} s"
    return f"ends with {outcome.code}, {outcome.seconds:.0f} s"


def tables(runs):
    """Returns a table for each number of ranks, and each of them that a fault befalls."""
    lines = []
    for size, rank in dict.fromkeys((case.size, case.rank) for case in campaign.CASES):
        lines += [f"| rank {rank} of {size} | " + " | ".join(campaign.LAUNCHERS) + " |"]
        lines += ["|---" * (1 + len(campaign.LAUNCHERS)) + "|"]
        for case in campaign.CASES:
            if (case.size, case.rank) == (size, rank):
                found = runs.get(str(case), {})
                cells = [found.get(launcher, "not yet") for launcher in campaign.LAUNCHERS]
                lines.append(f"| {case.fault} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write(found):
    """Takes down what was as promised, and puts the tables in their place in the page."""
    runs = json.loads(RUNS.read_text())
    for (launcher, case), outcome in found.items():
        if not campaign.wrong_with(case, outcome):
            runs.setdefault(str(case), {})[launcher] = cell(outcome)
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    text = FILE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    FILE.write_text(before + BEGIN + "\n" + tables(runs) + END + after)
