"""How a job starts in one process: what launchers say, and which GPU a process takes."""

import json

import pytest
import tensorflow as tf

from syncbn import training
from syncbn._src.communicators.launcher import ClusterTask, cluster_task, launcher_engine
from syncbn._src.training import job_start

VARIABLES = (
    *("TF_CONFIG", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in VARIABLES:
        # Set first, so that what a test sets is taken away after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def config(cluster, kind="worker", index=0):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


def test_a_process_that_nobody_launched_is_alone():
    job = training.start()
    assert job == training.Job("local", 0, 1, 0)
    assert [int(one) for one in job.shard(tf.data.Dataset.range(3))] == [0, 1, 2]
    with job.scope():
        assert not tf.distribute.has_strategy()


def test_a_seed_is_that_of_all_generators():
    drawn = []
    for _ in range(2):
        training.start(seed=4)
        drawn.append(float(tf.random.uniform([])))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({}, None),
        ({"HOROVOD_SIZE": "1"}, "horovod"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "mpi"),
        ({"PMI_SIZE": "4"}, "mpi"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, "mpi"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "mpi"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        # horovodrun over Gloo within an allocation.
        ({"HOROVOD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}, "horovod"),
        # multiworker.py, started by srun.
        (
            {"TF_CONFIG": config({"worker": ["a:1", "b:1"]}), "SLURM_STEP_NUM_TASKS": "2"},
            "tf.distribute",
        ),
        ({"TF_CONFIG": "{}"}, None),
    ],
)
def test_the_engine_is_that_of_the_launcher(environment, engine, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher_engine() == engine


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (config({"worker": ["a:1", "a:2", "b:1"]}, index=1), ClusterTask(1, 1, 3)),
        (config({"worker": ["a:1", "a:2", "b:1"]}, index=2), ClusterTask(2, 0, 3)),
        (config({"chief": ["a:1"], "worker": ["b:1"]}, "chief"), ClusterTask(0, 0, 2)),
        (config({"chief": ["a:1"], "worker": ["b:1"]}), ClusterTask(1, 0, 2)),
        (config({"worker": {"1": "b:1", "0": "a:1"}}, index=1), ClusterTask(1, 0, 2)),
        ("", None),
        ('{"environment": "cloud"}', None),
    ],
)
def test_a_worker_is_found_in_its_cluster(text, task, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert cluster_task() == task


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"cluster": {"worker": ["a:1"]}}),
        json.dumps({"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}),
        config({"worker": ["a:1"]}, index=3),
        config({"worker": "a:1"}),
        config({"worker": ["a:1"], "ps": ["b:1"]}, "ps"),
    ],
)
def test_a_cluster_without_this_worker_is_an_error(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG must describe a cluster of workers, and the"):
        training.start()


def test_what_cannot_be_started_is_refused():
    with pytest.raises(ValueError, match=r"must be one of .*Received: engine='mirrored'"):
        training.start("mirrored")
    with pytest.raises(ValueError, match=r"needs TF_CONFIG.* Received: none"):
        training.start("tf.distribute")
    with pytest.raises(TypeError, match=r"must be a tf\.data\.Dataset"):
        training.start().shard([1, 2])


class Devices:
    """GPUs of a machine that has none."""

    def __init__(self, count, monkeypatch, started=False):
        self.gpus, self.visible, self.growing = [f"GPU:{i}" for i in range(count)], None, []
        self.started = started
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: self.gpus)
        monkeypatch.setattr(tf.config, "set_visible_devices", self.show)
        monkeypatch.setattr(
            tf.config.experimental,
            "set_memory_growth",
            lambda gpu, growth: self.growing.append((gpu, growth)),
        )

    def show(self, gpu, kind):
        if self.started:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.visible = gpu


@pytest.mark.parametrize(
    ("gpus", "local_rank", "own"),
    [(4, 0, "GPU:0"), (4, 3, "GPU:3"), (1, 0, "GPU:0"), (1, 3, "GPU:0"), (0, 3, None)],
)
def test_a_process_takes_the_gpu_of_its_number(gpus, local_rank, own, monkeypatch):
    devices = Devices(gpus, monkeypatch)
    job_start._use_gpu(local_rank)
    assert devices.visible == own
    assert devices.growing == ([(own, True)] if own else [])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    Devices(2, monkeypatch)
    with pytest.raises(ValueError, match=r"Received: 2 GPUs, and local rank 2\. Start 2 processes"):
        job_start._use_gpu(2)


def test_a_gpu_is_chosen_before_tensorflow_starts(monkeypatch):
    Devices(2, monkeypatch, started=True)
    with pytest.raises(RuntimeError, match=r"only before TensorFlow starts.* first call of the"):
        job_start._use_gpu(1)
