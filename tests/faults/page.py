"""The tables in docs/faults.md, made of what the campaign has found."""

from tests import processes
from tests.faults import campaign

FILE = processes.ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- made by make test-faults -->\n", "<!-- end -->\n"


def cell(case, outcome):
    """One cell of a table."""
    wrong = campaign.wrong_with(case, outcome)
    if wrong:
        return f"**{wrong}**"
    if outcome.code == 0:
        return f"goes on, {outcome.seconds:.0f} s"
    return f"ends with {outcome.code}, {outcome.seconds:.0f} s"


def tables(found):
    """Returns a table for each number of ranks, and each of them that a fault befalls."""
    lines = []
    for size, rank in dict.fromkeys((case.size, case.rank) for case in campaign.CASES):
        lines += [f"| rank {rank} of {size} | " + " | ".join(campaign.LAUNCHERS) + " |"]
        lines += ["|---" * (1 + len(campaign.LAUNCHERS)) + "|"]
        for case in campaign.CASES:
            if (case.size, case.rank) == (size, rank):
                cells = [cell(case, found[launcher, case]) for launcher in campaign.LAUNCHERS]
                lines.append(f"| {case.fault} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write(found):
    """Puts the tables in their place in the page."""
    text = FILE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    FILE.write_text(before + BEGIN + "\n" + tables(found) + END + after)
