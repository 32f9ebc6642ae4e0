"""`make test` and `make quick`: what they run, and that a part that fails stops no other."""

import re

import pytest

from tests import processes

# Targets that take the place of parts.
PARTS = """
good last:
	@echo "$@ is made"
bad:
	@echo "$@ is made"; exit 3
"""


def make(folder, *arguments, **env):
    """Runs make as if everything were installed, and apart from the make that may run this."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    (folder / ".test").touch()
    command = ["make", f"VENV={folder}", *arguments]
    return processes.run([("make", command, {"MAKEFLAGS": "", "MAKELEVEL": "0", **env})])


@pytest.mark.parametrize("target", ["test", "quick"])
def test_after_a_part_that_fails_the_others_are_made(target, tmp_path):
    parts = tmp_path / "parts.mk"
    parts.write_text(PARTS)
    arguments = [target, f"{target}_parts=good bad last"]
    finished = make(tmp_path, *arguments, MAKEFILES=str(parts))
    assert finished.code == 2, finished.output
    said = re.findall(r"^(\w+) is made$", finished.output, re.MULTILINE)
    assert said == ["good", "bad", "last"]
    table = re.findall(r"^(\w+) +\d+ s  (\w+)$", finished.output, re.MULTILINE)
    assert table == [("passed", "good"), ("FAILED", "bad"), ("passed", "last")]


def test_when_all_pass_so_does_make(tmp_path):
    parts = tmp_path / "parts.mk"
    parts.write_text(PARTS)
    finished = make(tmp_path, "test", "test_parts=last good", MAKEFILES=str(parts))
    assert finished.code == 0, finished.output
    assert len(re.findall(r"^passed ", finished.output, re.MULTILINE)) == 2, finished.output


@pytest.mark.parametrize(
    ("target", "parts", "suites"),
    [
        (
            "test",
            ["lint", "lint-scripts", "types", "test-keras-3", "test-keras-2", "test-launchers"],
            [("0", "single"), ("1", "single"), ("", "launchers")],
        ),
        ("quick", ["lint", "lint-scripts", "types", "test-quickly"], [("0", "single")]),
    ],
)
def test_the_parts_are(target, parts, suites, tmp_path):
    # Says what it would run, instead of running it.
    finished = make(tmp_path, "-n", target)
    assert finished.code == 0, finished.output
    assert re.findall(r"^passed +\d+ s  (\S+)$", finished.output, re.MULTILINE) == parts
    pytests = r"(?:TF_USE_LEGACY_KERAS=(\d) )?\S+ -m pytest .*?tests/(\w+)"
    assert re.findall(pytests, finished.output) == suites, finished.output


def test_every_test_that_is_left_out_by_name_exists():
    makefile = (processes.ROOT / "Makefile").read_text().replace("\\\n", "")
    lists = re.findall(r"^(\w+) := ([a-z_ ]+)$", makefile, re.M)
    left_out = {name: files.split() for name, files in lists if name in ("keras_free", "slow")}
    assert left_out.keys() == {"keras_free", "slow"}
    for names in left_out.values():
        for name in names:
            assert (processes.ROOT / "tests" / "single" / f"test_{name}.py").exists(), name
