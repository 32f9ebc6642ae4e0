"""`launch/train_digits.py` under every launcher: workers that die, checkpoints, bad input."""

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from tests import processes

# The digits come from scikit-learn.
run = functools.partial(processes.run, hide=False)
SCRIPT = str(processes.ROOT / "launch" / "train_digits.py")
# Ten steps in an epoch.
TRAIN = [sys.executable, SCRIPT, "--batch-per-replica", "64"]
END_WITHIN = 60  # seconds that a job may go on after one of its workers has died


def job(launcher, *command, workers=2):
    """The command of a job, as a user types it."""
    size = str(workers)
    if launcher == "multiworker":
        script = str(processes.ROOT / "launch" / "multiworker.py")
        return [sys.executable, script, "--workers", size, "--", *command]
    if launcher == "mpirun":
        return ["mpirun", "-np", size, "--oversubscribe", *command]
    return [*launcher.split(), "-np", size, *command]


@pytest.mark.parametrize(
    ("launcher", "legacy"),
    [
        ("mpirun", False),
        ("horovodrun --gloo", True),
        ("multiworker", False),
    ],
)
def test_a_job_whose_worker_dies_ends_and_goes_on_from_its_checkpoint(launcher, legacy, tmp_path):
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.csv"
    marker = f"{uuid.uuid4().hex}.csv"  # tells this job's processes from others
    train = [*TRAIN, "--checkpoint", str(checkpoints)]
    env = {"TF_USE_LEGACY_KERAS": str(int(legacy))}

    killed, over = [], threading.Event()
    killer = threading.Thread(target=_kill_a_worker, args=(marker, checkpoints, killed, over))
    killer.start()
    command = job(launcher, *train, "--epochs", "5000", "--metrics", str(tmp_path / marker))
    finished = run([(launcher, command, {})], takes=25, env=env)
    ended = time.monotonic()
    over.set()
    killer.join()
    assert killed, finished.output
    assert "ended after the limit" not in finished.output, finished.output
    assert finished.code != 0, finished.output
    assert ended - killed[0] < END_WITHIN, finished.output
    # In the words of mpirun, multiworker.py and horovodrun.
    assert re.search("signal 9|SIGKILL|Exit code: 137", finished.output), finished.output
    assert not _workers(marker), "processes are still there"

    # The one before the last may be there still, if the job ended while it was replaced.
    found = checkpoints.glob("checkpoint-*/progress.json")
    epochs = max(json.loads(progress.read_text())["epoch"] for progress in found)
    # With what horovodrun chooses itself to carry messages.
    launcher = launcher.removesuffix(" --gloo")
    command = job(launcher, *train, "--epochs", str(epochs + 2), "--metrics", str(metrics))
    finished = run([(launcher, command, {})], env=env)
    assert finished.code == 0, finished.output
    assert finished.output.count(f"Going on after epoch {epochs}") == 1, finished.output
    lines = metrics.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", str(epochs), str(epochs + 1)]
    # Every worker but the first is silent, and the first says how well it went.
    assert finished.output.count("synchronized, 2 replicas x 64  ") == 1, finished.output


def _kill_a_worker(marker, checkpoints, killed, over):
    """Kills one of the job's workers once there is a checkpoint; they are in a later epoch then."""
    while not over.wait(0.05):
        if list(checkpoints.glob("checkpoint-*")) and len(workers := _workers(marker)) == 2:
            os.kill(max(workers), signal.SIGKILL)
            killed.append(time.monotonic())
            return


def _workers(marker):
    """The processes of the training script itself, not those of the launchers around it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace").split("\0")
            if line[1:2] == [SCRIPT] and any(marker in argument for argument in line):
                found.append(int(pid))
    return found


def test_without_join_workers_with_more_batches_wait_forever(tmp_path):
    # What `join` is for; tests/parallel/test_join.py has the same job with it.
    command = processes.program("without_join", str(tmp_path))
    finished = processes.run([("mpirun", job("mpirun", *command, workers=3), {})])
    # The others' first step waits for the one that has nothing, until that one ends the job.
    assert "nobody came" in finished.output, finished.output
    assert "is done" not in finished.output, finished.output


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["--engine", "multiworker"], {"TF_CONFIG": "{"}, "TF_CONFIG must describe a cluster"),
        (
            [],
            {"TF_CONFIG": json.dumps({"cluster": {"worker": ["a:1"]}, "task": {"index": 3}})},
            "TF_CONFIG must describe a cluster",
        ),
        (["--batch-per-replica", "1000"], {}, "There are 1280"),
        (["--compare", "--metrics", "x.csv"], {}, "is for one run"),
    ],
)
def test_the_script_says_what_is_wrong(arguments, env, message):
    finished = run([("train", [sys.executable, SCRIPT, *arguments], env)])
    assert finished.code not in (0, 124), finished.output
    assert message in finished.output, finished.output


def test_skipped_steps_are_not_timed():
    code = (
        "from types import SimpleNamespace\n"
        "from train_digits import StepRecorder\n"
        "recorder = StepRecorder()\n"
        "weights = [0.0]\n"
        "recorder.set_model(SimpleNamespace(get_weights=lambda: list(weights)))\n"
        "for logs in None, {}, {'loss': float('nan'), 'accuracy': float('nan')}:\n"
        "    recorder.on_train_batch_begin(0)\n"
        "    recorder.on_train_batch_end(0, logs)\n"
        "assert (recorder.seconds, recorder.early_weights) == ([], [])\n"
        "weights = [1.0]\n"
        "recorder.on_train_batch_begin(3)\n"
        "recorder.on_train_batch_end(3, {'loss': 2.0, 'accuracy': 0.5})\n"
        "assert len(recorder.seconds) == 1 and recorder.early_weights == [1.0]\n"
    )
    env = {"PYTHONPATH": os.path.dirname(SCRIPT)}
    finished = run([("", [sys.executable, "-c", code], env)])
    assert finished.code == 0, finished.output


def test_a_job_ends_when_the_checkpoint_is_of_another_model(tmp_path):
    other = (
        "import tensorflow as tf, syncbn\n"
        "model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(1)])\n"
        f"preemption = syncbn.training.PreemptionCheckpoint({str(tmp_path)!r}, every=1)\n"
        "preemption.restore(model)\n"
        "preemption.step(0, 1)\n"
    )
    finished = processes.python(other)
    assert finished.code == 0, finished.output
    train = [*TRAIN, "--epochs", "1", "--checkpoint", str(tmp_path)]
    finished = run([("mpirun", job("mpirun", *train), {})])
    assert finished.code not in (0, 124), finished.output
    assert "A checkpoint must be of this model. Received" in finished.output, finished.output
    assert "ended after the limit" not in finished.output, finished.output


def test_workers_with_other_arguments_are_told():
    ranks = {
        "mpirun": "$OMPI_COMM_WORLD_RANK",
        "multiworker": """$(python -c "import json, os; """
        """print(json.loads(os.environ['TF_CONFIG'])['task']['index'])")""",
    }
    for launcher, rank in ranks.items():
        train = " ".join([*TRAIN[:-1], f"$((32 + 32 * {rank}))"])
        finished = run([(launcher, job(launcher, "bash", "-c", train), {})])
        assert finished.code not in (0, 124), finished.output
        # Each says so, and with what it was started itself.
        told = "Rank 1 was started with other arguments than rank 0. Those of rank"
        for number, batch in enumerate([32, 64]):
            own = rf"{told} {number}: .*\('batch_per_replica', {batch}\)"
            assert re.search(own, finished.output), finished.output


def test_workers_with_other_models_are_told():
    """The synchronized layers of one wait for nobody; the weights have the same shapes."""
    command = processes.program("other_models")
    for launcher in "mpirun", "horovodrun --gloo":
        finished = processes.run([(launcher, job(launcher, *command), {})])
        assert finished.code not in (0, 124), finished.output
        assert "must have the same synchronized layers" in finished.output, finished.output
