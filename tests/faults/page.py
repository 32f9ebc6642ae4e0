"""docs/faults.md, made of what the campaign has found."""

from tests import processes
from tests.faults import campaign

FILE = processes.ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- made by make test-faults -->\n", "<!-- end -->\n"


def cell(launcher, fault, outcome):
    """One cell of the table."""
    wrong = campaign.wrong_with(launcher, fault, outcome)
    if wrong:
        return f"**{wrong}**"
    if outcome.code == 0:
        return f"goes on, {outcome.seconds:.0f} s"
    return f"ends with {outcome.code}, {outcome.seconds:.0f} s"


def write(found):
    """Puts the table in its place in the page."""
    rows = ["| rank 1 | " + " | ".join(campaign.LAUNCHERS) + " |"]
    rows.append("|---" * (1 + len(campaign.LAUNCHERS)) + "|")
    for fault in campaign.SAYS:
        cells = [cell(one, fault, found[one, fault]) for one in campaign.LAUNCHERS]
        rows.append(f"| {fault} | " + " | ".join(cells) + " |")
    text = FILE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    FILE.write_text(before + BEGIN + "\n".join(rows) + "\n" + END + after)
