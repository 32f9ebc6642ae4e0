"""The examples of pages of docs/ run as they stand, each in several workers."""

import re
import sys

import pytest

from tests import processes
from tests.keras import KERAS_3

PAGES = ("everyday.md", "monitor.md")
# What follows the name of the file are the lines of the script.
EXAMPLES = {
    match[1]: match[0]
    for page in PAGES
    for match in re.findall(
        r"```python\n(# (\w+\.py)\n.*?)```",
        (processes.ROOT / "docs" / page).read_text(),
        re.DOTALL,
    )
}
LAUNCHERS = {
    "everyday.py": ["multiworker", "mpi"],
    "averaged.py": ["mpi"],
    "plain.py": ["horovod"],
    "monitored.py": ["mpi"],
}


def command(launcher, *python):
    if launcher == "mpi":
        return processes.mpirun(2, *python)
    if launcher == "horovod":
        return processes.horovodrun(2, "gloo", *python)
    script = str(processes.ROOT / "launch" / "multiworker.py")
    return [sys.executable, script, "--workers", "2", "--", *python]


def test_every_example_is_run():
    assert set(EXAMPLES) == set(LAUNCHERS)


@pytest.mark.skipif(not KERAS_3, reason="SwapEMAWeights is of Keras 3")
@pytest.mark.parametrize(
    ("name", "launcher"), [(name, one) for name, all_ in LAUNCHERS.items() for one in all_]
)
def test_the_example_runs(name, launcher, tmp_path):
    script = tmp_path / name
    script.write_text(EXAMPLES[name])
    # What it writes goes there, too.
    code = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path({name!r})"
    finished = processes.run([(name, command(launcher, sys.executable, "-c", code), {})])
    assert finished.code == 0, finished.output
    # Each worker prints what is the same on all; launchers put tags in between.
    results = re.findall(r"\{'[^}]*\}|\[[-+\de., ]*\.[-+\de., ]*\]", finished.output)
    assert len(results) == 2, finished.output
    assert results[0] == results[1], finished.output
