"""The examples of the README run as they stand, under the engine that they are for."""

import re
import sys

import pytest

from tests import processes

README = (processes.ROOT / "README.md").read_text()
EXAMPLES = {
    match[1]: match[0]
    for match in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", README, re.DOTALL)
}


def commands(name, script):
    python = [sys.executable, script]
    if name in ("mirrored.py", "whole_model.py"):
        return [(name, python, {})]
    if name in ("horovod_job.py", "train.py", "warmup.py"):
        return [(name, processes.horovodrun(2, "gloo", *python), {})]
    if name in ("mpi_job.py", "nested_job.py"):
        return [(name, processes.mpirun(2, *python), {})]
    launcher = str(processes.ROOT / "launch" / "multiworker.py")
    return [(name, [sys.executable, launcher, "--workers", "2", "--", *python], {})]


def test_there_is_an_example_for_each_engine():
    jobs = ["mirrored.py", "horovod_job.py", "mpi_job.py", "multiworker_job.py", "nested_job.py"]
    assert list(EXAMPLES) == [*jobs, "train.py", "warmup.py", "whole_model.py"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, tmp_path):
    script = tmp_path / name
    script.write_text(EXAMPLES[name])
    finished = processes.run(commands(name, str(script)))
    assert finished.code == 0, finished.output
    if name in ("mirrored.py", "multiworker_job.py", "train.py", "warmup.py"):
        assert "Epoch 2/2" in finished.output
    elif name == "whole_model.py":
        assert "52 of 52 normalizations converted" in finished.output
    else:
        # Each worker prints its rank and the moving mean; launchers put tags in between.
        means = re.findall(
            r"\[[-+e\d\s]*\.[-+.e\d\s]*\]", re.sub(r"\[[\d,]+\]<\w+>:", "", finished.output)
        )
        assert len(means) == 2, finished.output
        assert means[0] == means[1], finished.output


@pytest.mark.parametrize("target", ["demo", "test", "quick", "bench"])
def test_the_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (processes.ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_horovod_script_has_help_and_refuses_unknown_arguments():
    script = str(processes.ROOT / "launch" / "install_horovod.sh")
    finished = processes.run([("help", [script, "--help"], {})])
    assert finished.code == 0
    assert "--nccl" in finished.output
    finished = processes.run([("unknown", [script, "--nothing"], {})])
    assert finished.code == 1
    assert "unknown argument: --nothing" in finished.output
