"""The code of the README and of the other pages runs as it stands, under the engine that it is for.

Few launches run all of it, since most of the time of each goes into starting TensorFlow: one for
each engine and Keras, but for tf.distribute over several processes, which has one strategy in each
(of scripts that leave it to `start`, the same).
"""

import re
import sys
import zipfile

import pytest

from tests import documentation, processes

SCRIPTS = {script.name: script for script in documentation.scripts()}
FIT = ["mirrored.py", "multiworker_job.py", "horovod_job.py", "mpi_job.py", "join.py", "warmup.py"]
LOOPS = ["horovod_loop.py", "mpi_loop.py", "nested_job.py", "elastic.py"]
# They print their rank, and what is the same on all.
EVERYDAY = ["everyday.py", "averaged.py", "plain.py", "monitored.py", "preempted.py"]

# Of docstrings, those that need a job.
EXAMPLES = """
import sys
from tests import docstrings
for name in docstrings.IN_A_JOB["horovod" if "horovod.tensorflow" in sys.modules else "mpi"]:
    print(name, docstrings.run_examples(name))
"""


def jobs():
    """The scripts of each launch, by engine and Keras."""
    found = {}
    for script in SCRIPTS.values():
        alone = script.name if script.engine == "multiworker" else ""
        found.setdefault((script.engine, script.keras_2, alone), []).append(script)
    # Whatever the pages' commands are: they say that all of it works there, too.
    found["multiworker", False, "everyday"] = [SCRIPTS[name] for name in EVERYDAY]
    # What is to run with both.
    found["horovod", True, ""].append(SCRIPTS["horovod_after.py"])
    for engine in "horovod", "mpi":
        found[engine, False, ""].append(documentation.Script(f"{engine}_names.py", EXAMPLES, ""))
    return found


JOBS = jobs()


def command(engine, *arguments):
    python = processes.program("documented_scripts", *arguments)
    if engine == "horovod":
        return processes.horovodrun(2, "gloo", *python)
    if engine == "mpi":
        return processes.mpirun(2, *python)
    launcher = str(processes.ROOT / "launch" / "multiworker.py")
    return [sys.executable, launcher, "--workers", "2", "--", *python]


@pytest.mark.parametrize(
    ("engine", "keras_2", "alone"),
    # What a page on migration starts from uses nothing of this package.
    [pytest.param(*job, marks=pytest.mark.wide if "before" in job[2] else []) for job in JOBS],
)
def test_the_scripts_of_the_pages_run(engine, keras_2, alone, tmp_path):
    scripts = JOBS[engine, keras_2, alone]
    # A process that splits its CPU does so before it computes, and initializes Horovod once.
    first = "set_logical_device", "init_horovod()"
    scripts = sorted(scripts, key=lambda one: [words not in one.text for words in first])
    for script in scripts:
        (tmp_path / script.name).write_text(script.text)
    for path in documentation.SCRIPTS.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    arguments = [str(tmp_path), *(str(tmp_path / script.name) for script in scripts)]
    if engine == "one process":
        job = processes.program("documented_scripts", "--fork", *arguments)
    else:
        job = command(engine, *arguments)
    env = {"TF_USE_LEGACY_KERAS": "1" if keras_2 else "0"}
    finished = processes.run([(engine, job, env)], takes=60)
    assert finished.code == 0, finished.output
    ranks = 1 if engine == "one process" else 2
    for script in scripts:
        printed = [(tmp_path / f"{script.name[:-3]}.{rank}").read_text() for rank in range(ranks)]
        check(script.name, printed, tmp_path / script.name[:-3])


def check(name, printed, folder):
    """Checks what a script has printed on each rank, and left in its folder."""
    if name in FIT:
        assert "Epoch 2/2" in printed[0], printed
    elif name in LOOPS:
        ranks, means = zip(*(one.split(maxsplit=1) for one in printed), strict=True)
        assert ranks == ("0", "1")
        assert means[0] == means[1]
        assert re.fullmatch(r"\[[-+.e\d\s]+\]\s*", means[0]), means
    elif name in EVERYDAY:
        ranks, results = zip(*(one.split(maxsplit=1) for one in printed), strict=True)
        assert ranks == ("0", "1")
        assert results[0] == results[1]
        assert re.search(r"\d\.\d", results[0]), results
    elif name == "advice.py":
        assert "Synchronize " in printed[0]
        assert "layer " in printed[0]
    elif name == "whole_model.py":
        assert printed[0].count("1 + 1") == 52
    elif name == "start_page.py":
        assert "[-1.  1. -1.  1.]\n[-1.18 -0.78  0.78  1.18]" in printed[0]
        assert "1 + 1" in printed[0]
    elif name == "layers_page.py":
        assert printed == [""]
    elif name.endswith("_names.py"):
        assert printed[0]
        assert printed[0] == printed[1]
    else:
        assert_learned(name, printed, folder)


def assert_learned(name, printed, folder):
    """A script for migration has learned the images, and rank 0 has left what it should."""
    assert re.match(r"\w+_(before|after)\.py", name), f"nothing is known of {name}"
    accuracies = re.findall(r"val_accuracy: (\S+)", printed[0])
    assert len(accuracies) == 4, printed[0]
    assert float(accuracies[-1]) > 0.9, printed[0]
    assert not any(printed[1:])
    assert zipfile.is_zipfile(folder / "best.keras")
    events = list(folder.glob("logs/validation/events.*"))
    assert [file.stat().st_size > 100 for file in events] == [True], events


@pytest.mark.parametrize("target", ["demo", "quick", "test", "docs"])
def test_the_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in (processes.ROOT / "README.md").read_text()
    assert re.search(rf"^{target}:", (processes.ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_horovod_script_has_help_and_refuses_unknown_arguments():
    script = str(processes.ROOT / "launch" / "install_horovod.sh")
    finished = processes.run([("help", [script, "--help"], {})])
    assert finished.code == 0
    assert "--nccl" in finished.output
    finished = processes.run([("unknown", [script, "--nothing"], {})])
    assert finished.code == 2
    assert "unknown argument: --nothing" in finished.output
