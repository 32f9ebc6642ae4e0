"""The pages of the documentation, as far as reading them goes: links, commands, what is run."""

import argparse
import itertools
import re
import unicodedata
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

import syncbn
import syncbn.testing
from syncbn._src import cli
from syncbn._src.models.equivalence import check_command
from tests import documentation
from tests.documentation import PAGES, ROOT

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MAKEFILE = (ROOT / "Makefile").read_text()
DIRECTIVES = re.compile(r"\{(commandhelp|eval-rst|include|literalinclude|toctree)\}")


def slug(heading):
    """The anchor that GitHub, and the site, make of a heading."""
    text = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    kept = [c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def anchors(page):
    text, tokens = page.read_text(), MarkdownIt().parse(page.read_text())
    found = [
        slug(after.content)
        for token, after in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]
    # Several headings of one name are numbered, on the site and elsewhere.
    assert len(set(found)) == len(found), f"{page}: two headings of one name"
    return {
        *found,
        *re.findall(r'<a id="([\w-]+)">', text),
        *re.findall(r"^\((.+)\)=$", text, re.M),
    }


def links(page):
    for token in MarkdownIt().parse(page.read_text()):
        for child in token.children or ():
            yield from (child.attrs[name] for name in ("href", "src") if name in child.attrs)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_within_the_repository_leads_somewhere(name):
    page = ROOT / name
    for link in links(page):
        if re.match(r"(https?|mailto):", link):
            continue
        target, _, anchor = unquote(link).partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link


def test_the_links_and_the_code_of_the_pages_are_found():
    assert sum(1 for page in PAGES for _ in links(page)) > 150
    assert len(list(documentation.scripts())) > 15


@pytest.mark.parametrize("name", NAMES)
def test_code_that_is_not_run_gives_its_reason_and_other_code_is_known(name):
    known = {"python", "sh", "", "console", "text"}
    for block in documentation.blocks(ROOT / name):
        assert block.language in known or DIRECTIVES.match(block.language), block
        if block.language == "python":
            compile(block.text, f"{name}:{block.line}", "exec")


def test_each_script_has_a_name_of_its_own_and_a_command():
    found = list(documentation.scripts())
    assert all(script.command for script in found), [one.name for one in found if not one.command]
    names = [script.name for script in found]
    assert len(set(names)) == len(names)


def test_every_script_for_migration_is_named_with_its_command():
    named = {script.name for script in documentation.scripts()}
    assert named >= {
        f"{engine}_{when}.py"
        for engine in ("mirrored", "multiworker", "horovod", "mpi")
        for when in ("before", "after")
    }
    assert named >= {path.name for path in documentation.SCRIPTS.glob("*_*.py")}


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_page_exist(name):
    text = (ROOT / name).read_text()
    shell = [one.text for one in documentation.blocks(ROOT / name) if one.language == "sh"]
    code = "\n".join([*shell, *re.findall(r"`([^`\n]+)`", text)])
    for target in re.findall(r"^\s*make ([a-z][\w-]*)", code, re.M):
        assert re.search(rf"^{target}[\w -]*:", MAKEFILE, re.M), target
    for command in re.findall(r"(?:^|\n|-m )syncbn ([a-z][a-z-]+)\b", code):
        assert command in cli._COMMANDS, command
    for path in re.findall(
        r"(?:^|\s)((?:launch|docker|benchmarks|tests|docs)/[\w./-]+\.\w+)", code
    ):
        assert (ROOT / path).exists() or "*" in path, path


def test_the_options_of_check_that_pages_name_exist():
    parser = argparse.ArgumentParser()
    check_command.add_arguments(parser)
    options = set(re.findall(r"syncbn check \S+ (--[\w-]+)", (ROOT / "docs/start.md").read_text()))
    assert options
    assert options <= {name for action in parser._actions for name in action.option_strings}


def test_the_readme_fits_two_screens():
    # Two of 45 lines; examples that fold are unfolded by those who want them.
    text = (ROOT / "README.md").read_text()
    shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert len(shown.splitlines()) <= 90


def test_every_public_name_has_its_page():
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    public = [*syncbn.__all__, *syncbn.training.__all__, *syncbn.testing.__all__]
    assert sorted(listed) == sorted(set(public) - {"training"})
