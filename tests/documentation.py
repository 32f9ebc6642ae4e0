"""The pages of the documentation: their code, the commands that run it, and their links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for folder in (".", ".github", "docker", "docs", "launch")
    for path in (ROOT / folder).glob("*.md")
)
SCRIPTS = ROOT / "docs" / "migration"
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*\Z")
# The command that a page gives for a script, as code.
COMMAND = re.compile(r"(?:`|<code>)([^`<]*\bpython (\w+\.py)\b[^`<]*)(?:`|</code>)")


class Block(NamedTuple):
    """A block of code."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str
    """The reason that a comment before it gives, or nothing."""

    @property
    def name(self) -> str:
        """That of the script, where it is one by itself: ``train.py`` of ``# train.py``."""
        first = re.match(r"# (\w+\.py)\n", self.text)
        return first[1] if first else ""


class Script(NamedTuple):
    """A script that a page shows or names, and how the page says that it is run."""

    name: str
    text: str
    command: str

    @property
    def engine(self) -> str:
        words = {"horovodrun": "horovod", "mpirun": "mpi", "multiworker": "multiworker"}
        return next((words[word] for word in words if word in self.command), "one process")

    @property
    def keras_2(self) -> bool:
        return "TF_USE_LEGACY_KERAS=1" in self.command


def blocks(page: Path) -> Iterator[Block]:
    before = None
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            reason = NOT_RUN.search(before.content) if before is not None else None
            why = reason[1] if reason else ""
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, why)
        before = token if token.type == "html_block" else None


def scripts() -> Iterator[Script]:
    """Yields the scripts of all pages.

    Of a page that has code without a name, all of it together is one, as a reader who tries it
    out from the top runs it.
    """
    for page in PAGES:
        commands = {name: command for command, name in COMMAND.findall(page.read_text())}
        python = [one for one in blocks(page) if one.language == "python" and not one.not_run]
        for block in python:
            if block.name:
                yield Script(block.name, block.text, commands.pop(block.name, ""))
        rest = [one.text for one in python if not one.name]
        if rest:
            yield Script(f"{page.stem}_page.py", "\n".join(rest), f"python {page.stem}_page.py")
        for name, command in commands.items():
            if (SCRIPTS / name).exists():
                yield Script(name, (SCRIPTS / name).read_text(), command)
