"""What pip installs is enough: every command and launcher, from a folder with nothing in it."""

import json
import shutil
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest

from tests import processes

ENGINES = {
    "mirrored": [],
    "multiworker": ["--workers", "2"],
    "horovod": ["-np", "2"],
    "mpi": ["-np", "2", "--oversubscribe"],
}
# Without the checkout, and without what Keras would import for nothing.
HIDDEN = str(processes.ROOT / "tests" / "hidden")
MODULE = """
import tensorflow as tf, syncbn


def build_model():
    layers = [tf.keras.layers.Dense(4), syncbn.SyncBatchNormalization()]
    return tf.keras.Sequential([tf.keras.Input((3,)), *layers])
"""
JOB = """
import sys
import numpy as np
from mpi4py import MPI
import syncbn

layer = syncbn.SyncCentering(momentum=0.0)
layer(np.full((2, 3), MPI.COMM_WORLD.rank, "float32"), training=True)
print("mean", layer.moving_mean.numpy().tolist(), sys.argv[1:])
"""


@pytest.fixture(scope="module")
def environment():
    """The folder of a new environment with the wheel; what it needs is that of the tests' own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        for file in "pyproject.toml", "README.md", "LICENSE":
            shutil.copy(processes.ROOT / file, source)
        for files in "syncbn", "launch", "benchmarks":
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(processes.ROOT / files, source / files, symlinks=True, ignore=ignore)
        # By way of the source distribution, as packages are published. Nothing is downloaded: the
        # tests' environment has setuptools, which Horovod needs.
        python("-c", "import setuptools.build_meta as b; b.build_sdist(r'..')", cwd=source)
        (archive,) = folder.glob("*.tar.gz")
        offline = ("--no-deps", "--no-index", "-q", "--disable-pip-version-check")
        python("-m", "pip", "wheel", "--no-build-isolation", *offline, str(archive), cwd=folder)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "env", with_pip=False)
        (site,) = (folder / "env").glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        of_env = ("--python", str(folder / "env" / "bin" / "python"))
        python("-m", "pip", *of_env, "install", *offline, str(wheel), cwd=folder)
        yield folder / "env"


def python(*arguments, cwd):
    # Without the checkout, which pip would take for installed, and the constraints of `make`, whose
    # file is named relative to the checkout.
    env = {"PYTHONPATH": HIDDEN, "PIP_CONSTRAINT": ""}
    finished = processes.run([("python", [sys.executable, *arguments], env)], takes=20, cwd=cwd)
    assert finished.code == 0, finished.output


@pytest.fixture
def syncbn(environment, tmp_path):
    """Runs the command in an empty folder."""

    def run(*arguments, **changes):
        path = f"{environment / 'bin'}:{processes.environment()['PATH']}"
        env = {"PATH": path, "PYTHONPATH": HIDDEN, **changes}
        return processes.run([("syncbn", ["syncbn", *arguments], env)], cwd=tmp_path)

    return run


def test_the_wheel_has_launchers_and_benchmarks(environment):
    (package,) = environment.glob("lib/python*/site-packages/syncbn")
    assert not [path for path in package.rglob("*") if path.is_symlink()]
    for folder, pattern in ("launch", "*.sh"), ("launch", "*.py"), ("benchmarks", "**/*.py"):
        own = {path.name for path in (processes.ROOT / folder).glob(pattern)}
        copies = {path.name for path in (package / "_src" / "bundled" / folder).glob(pattern)}
        assert copies == own
        assert copies


@pytest.mark.parametrize(
    "words",
    [
        *(
            [],
            ["advise"],
            ["bench"],
            ["check"],
            ["diagnose"],
            ["doctor"],
            ["install-horovod"],
            ["report"],
            ["launch"],
        ),
        *(["launch", engine] for engine in ENGINES),
    ],
    ids=lambda words: " ".join(words) or "syncbn",
)
def test_help_does_not_wait_for_tensorflow(words, syncbn):
    finished = syncbn(*words, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert finished.code == 0, finished.output
    assert "usage: syncbn" in finished.output, finished.output
    for module in "tensorflow", "keras", "numpy", "rich":
        assert f" {module}\n" not in finished.output, finished.output


@pytest.mark.parametrize("engine", ENGINES)
def test_a_launcher_gives_the_command_its_arguments_and_returns_a_code(engine, syncbn):
    arguments = ["a  b", "$(echo hi)", "*", "", "--help", "--"]
    code = "import sys; sys.stdout.write(f'{sys.argv[1:]}\\n'); sys.exit(7)"
    finished = syncbn("launch", engine, *ENGINES[engine], "--", "python", "-c", code, *arguments)
    assert finished.code == 7, finished.output
    # Of the rank that fails first: the launcher may end the others before they print.
    assert str(arguments) in finished.output, finished.output


def test_a_job_synchronizes(syncbn, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    finished = syncbn("launch", "mpi", *ENGINES["mpi"], "--", "python", "job.py", "--own")
    assert finished.code == 0, finished.output
    for rank in range(2):
        assert f"[{rank}] mean [0.5, 0.5, 0.5] ['--own']\n" in finished.output, finished.output


def test_a_module_of_the_working_folder_is_found(syncbn, tmp_path):
    (tmp_path / "my_module.py").write_text(MODULE)
    finished = syncbn("check", "my_module:build_model", "--input-shape", "3", "--split", "3,1")
    assert finished.code == 0, finished.output
    assert "On 2 replicas the model does what it does on one." in finished.output
    finished = syncbn("report", "my_module:build_model", "--json")
    assert finished.code == 0, finished.output
    found = json.loads(
        finished.output[finished.output.index("{") : finished.output.rindex("}") + 1]
    )
    assert found["total"]["collectives"] == [1, 1]
    assert found["total"]["bytes"] == [8 * (2 * 4 + 1), 8 * 2 * 4]


def test_a_benchmark_runs(syncbn, tmp_path):
    # A module of the user's, of a name that the package has a folder of.
    (tmp_path / "launch.py").write_text("raise AssertionError('the user has not asked for this')")
    options = ["--case", "tiny", "--quick", "--repeats", "1"]
    finished = syncbn("bench", *options, PYTHONPATH=str(tmp_path))
    assert finished.code == 0, finished.output
    assert (tmp_path / "build" / "benchmarks" / "benchmarks.md").is_file()
