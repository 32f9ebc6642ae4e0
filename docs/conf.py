"""The documentation site: Sphinx reads this. `make docs` builds it, offline, into build/docs."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import syncbn
import syncbn.testing
from syncbn._src import cli

project = "syncbn"
author = "the authors of syncbn"
copyright = f"{author}; Apache 2.0"
version = release = syncbn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["migration"]

ROOT = Path(__file__).resolve().parent.parent
# The pages of what lies beside docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "docker/README.md": "containers.md",
    "launch/README.md": "launchers.md",
}

templates_path = ["templates"]

# The anchors of headings are those that forges make.
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that begin with what they include

# Public names by where they are defined, and so by what annotations refer to.
PUBLIC = {}
for _module in syncbn, syncbn.training, syncbn.testing:
    for _name in set(_module.__all__) - {"training"}:
        _public = getattr(_module, _name)
        PUBLIC[f"{_public.__module__}.{_name}"] = f"{_module.__name__}.{_name}"
        if getattr(_public, "_is_protocol", False):
            _public.__signature__ = inspect.Signature()
        elif "__init__" in vars(_public) and not hasattr(_public, "_fields"):
            # What Keras' metaclass shows has no names of arguments.
            _signature = inspect.signature(_public.__init__)
            _public.__signature__ = _signature.replace(
                parameters=list(_signature.parameters.values())[1:]
            )
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_ignore_module_all = False
default_role = "py:obj"
# What is in this package has to be found; TensorFlow's and Keras' pages are elsewhere.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!syncbn\.(?!_src)).*")]

toc_object_entries = False

html_theme = "pydata_sphinx_theme"
html_title = "syncbn"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
}
html_sidebars = {"index": []}


class CommandHelp(SphinxDirective):
    """The help of each command of `python -m syncbn`, as it prints it."""

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "100"  # of what argparse prints
        found: list[nodes.Node] = []
        for command in cli._COMMANDS:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                cli.main([command, "--help"])
            section = nodes.section(ids=[command])
            section += nodes.title(text=command)
            section += nodes.literal_block(text=printed.getvalue(), language="none")
            found.append(section)
        return found


def render_math(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Makes MathML of formulas in docstrings, which browsers show without any script."""

    def displayed(match: re.Match[str]) -> str:
        mathml = latex2mathml.converter.convert(match[1], display="block")
        return f".. raw:: html\n\n   {mathml}"

    def within(match: re.Match[str]) -> str:
        return "``" + re.sub(r"\\mathrm{(.)}", r"\1", match[1]) + "``"

    text = re.sub(r"\$\$(.+?)\$\$", displayed, "\n".join(lines))
    lines[:] = re.sub(r"\$(.+?)\$", within, text).split("\n")


def resolve_public_names(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Links a name that is defined in a private module to its public page."""
    public = PUBLIC.get(node["reftarget"])
    if node["refdomain"] != "py" or public is None:
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def resolve_links(app: Any, page: str, source: list[str]) -> None:
    """Puts the files that a page includes into it, and makes links lead to pages of the site.

    In the repository pages link to files, such as ``../CONTRIBUTING.md``.
    """
    source[0] = links_of_the_site(source[0], "docs")
    source[0] = re.sub(
        r"```{include} \.\./(\S+)\n```",
        lambda match: links_of_the_site((ROOT / match[1]).read_text(), str(Path(match[1]).parent)),
        source[0],
    )
    # To anchors that a page makes itself, as for what its tables refer to.
    source[0] = re.sub(r"\[(\d+)\]\(#\1\)", r'<a href="#\1">\1</a>', source[0])


def links_of_the_site(text: str, folder: str) -> str:
    """Returns the text of a file in ``folder`` with its links as a page in docs/ has them."""

    def resolved(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(folder, match[1]))
        return f"]({PAGES.get(path, os.path.relpath(path, 'docs'))}"

    return re.sub(r"\]\(([\w./-]+)(?=[)#])", resolved, text)


def leave_out_paths(app: Any, document: Any) -> None:
    """Leaves out the lines of differences in which Sphinx names files by their absolute paths."""
    for block in document.findall(nodes.literal_block):
        lines = block.rawsource.splitlines(keepends=True)
        if block.get("language") == "udiff" and lines[0].startswith("--- "):
            text = "".join(lines[2:])
            block.replace_self(nodes.literal_block(text, text, language="diff"))


def setup(app: Any) -> None:
    """Connects the above; Sphinx calls it."""
    app.add_directive("commandhelp", CommandHelp)
    app.connect("autodoc-process-docstring", render_math)
    app.connect("doctree-read", leave_out_paths)
    app.connect("missing-reference", resolve_public_names)
    app.connect("source-read", resolve_links)
