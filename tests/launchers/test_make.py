"""`make test` and its like: what they run, and that a part that fails stops no other."""

import re
import shutil

import pytest

from tests import processes

# Targets that take the place of parts.
PARTS = """
good last:
	@echo "$@ is made"
bad:
	@echo "$@ is made"; exit 3
"""

# An interpreter that says what it is asked to do.
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip freeze") echo tensorflow==2.99.0 ;;
  "-m pip install "*) echo "installs $*" ;;
  "-m pytest "*) echo "runs $*"; exit {code} ;;
esac
"""


def make(folder, *arguments, **env):
    """Runs make as if everything were installed, and apart from the make that may run this."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    for installed in ".test", ".docs":
        (folder / installed).touch()
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
            [
                *("lint", "lint-scripts", "types", "docs"),
                *("test-keras-3", "test-keras-2", "test-launchers"),
            ],
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


def test_the_matrix_goes_through_the_versions_that_there_are(tmp_path):
    for tool in ("cp", "grep", "mkdir", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for name, code in (("python3.11", 0), ("python3.12", 1)):
        (tmp_path / name).write_text(PYTHON.format(code=code))
        (tmp_path / name).chmod(0o755)
    command = [str(processes.ROOT / ".ci" / "matrix"), str(tmp_path / "made"), "-x", "tests/single"]
    finished = processes.run([("matrix", command, {"PATH": str(tmp_path)})])
    assert finished.code == 1, finished.output
    assert finished.output.count("runs -m pytest -x tests/single\n") == 3, finished.output
    assert re.search(r"installs .*\.\[test\] .*keras==3\.10\.\*", finished.output)
    _, table = finished.output.split("===== in all\n")
    assert "python3.10: left out: no python3.10 on the PATH\n" in table
    assert "python3.12: FAILED: tensorflow==2.99.0 \n" in table
    assert "python3.11 with tensorflow==2.16.*: passed: tensorflow==2.99.0 \n" in table
