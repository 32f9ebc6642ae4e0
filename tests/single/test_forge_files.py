"""What a forge reads: workflows, templates, the citation. They are read here, not run."""

import re
from pathlib import Path

import pytest
import yaml

from syncbn._src.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def steps(workflow):
    for job in workflow["jobs"].values():
        for step in job.get("steps", ()):
            yield job, step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_takes_actions_of_a_version(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job, step in steps(workflow):
        assert job["timeout-minutes"] <= 120
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_make_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text())
    targets = []
    for job, step in steps(workflow):
        made = re.findall(
            r"make (\S+)", step.get("run", "").replace("{{ ", "{{").replace(" }}", "}}")
        )
        for target in made:
            parts = job.get("strategy", {}).get("matrix", {}).get("part", ())
            targets += parts if target == "${{matrix.part}}" else [target]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_the_workflow_goes_through_all_parts_of_the_tests():
    parts = re.search(r"^test_parts := (.+)$", MAKEFILE, re.M)[1].split()
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    assert sorted([*jobs["part"]["strategy"]["matrix"]["part"], "docs"]) == sorted(parts)


def test_what_is_published_needs_no_token():
    publish = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"][
        "publish"
    ]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


def test_templates_are_yaml_and_ask_for_something():
    for name in "bug", "feature":
        template = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        required = [one for one in template["body"] if one.get("validations", {}).get("required")]
        assert required, name


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == VERSION
    assert {"message", "title", "authors", "cff-version"} <= citation.keys()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(VERSION)} - \d{{4}}-\d\d-\d\d$", changelog, re.M)
