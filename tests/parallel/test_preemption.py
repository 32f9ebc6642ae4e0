"""A job that is told to end saves, exits, and goes on: as if it had not been interrupted."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn import training
from syncbn._src.communicators.host_collectives import all_gather
from syncbn._src.models.training_job import job_of
from syncbn._src.training import preemption_notice
from tests.keras import keras
from tests.kinds_of_replicas import Nested, Strategy
from tests.parallel import workers

SAMPLES, BATCH, EPOCHS, SEED = 60, 12, 3, 7  # the batch is of all replicas
STEPS = SAMPLES // BATCH


@pytest.fixture(autouse=True)
def asked_after_each_step(monkeypatch):
    monkeypatch.setattr(preemption_notice, "PERIOD", 0.0)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(replicas, tmp_path):
    """One folder for all processes."""
    with _scope(replicas):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    processes = job_of(model).workers()
    own = np.zeros(512)
    own[: len(str(tmp_path))] = [*str(tmp_path).encode()]
    first = all_gather(processes, own, "folder")[0]
    yield Path(bytes(first[first > 0].astype(np.uint8)).decode())
    all_gather(processes, own, "done")  # before any of them deletes its own


def _scope(replicas):
    strategy = isinstance(replicas, Strategy)
    return replicas.strategy.scope() if strategy else contextlib.nullcontext()


def draw():
    rng = np.random.default_rng(3)
    x, y = rng.normal(2, 3, (SAMPLES, 3)), rng.normal(size=(SAMPLES, 2))
    return x.astype("float32"), y.astype("float32")


def make(norm, distribute=True, **options):
    keras.utils.set_random_seed(5)
    layers = [keras.layers.Dense(4, use_bias=False), norm, keras.layers.Activation("tanh")]
    model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer = training.distribute(optimizer) if distribute else optimizer
    model.compile(optimizer, "mse", jit_compile=False, **options)
    return model


class Signal(keras.callbacks.Callback):
    """Sends a signal to this process, before a step."""

    def __init__(self, epoch, step, number=signal.SIGTERM):
        super().__init__()
        self.at, self.number = (epoch, step), number
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, batch, logs=None):
        # Where the notice is asked, so in this thread.
        self.seen.append((self.epoch, batch))


def by_numbers(preemption, scope, batch=BATCH):
    x, y = map(tf.constant, draw())
    with scope:
        numbers = preemption.indices(SAMPLES, batch, EPOCHS, SEED)
    data = numbers.map(lambda index: (tf.gather(x, index), tf.gather(y, index)))
    return {"x": data, "steps_per_epoch": SAMPLES // batch}


def as_they_come(replicas, alone):
    """The samples in their order, whole, and as each worker shares in them."""
    x, y = draw()
    data = tf.data.Dataset.from_tensor_slices((x, y))
    if alone or (isinstance(replicas, Strategy) and not isinstance(replicas, Nested)):
        return {"x": data.batch(BATCH)}
    process = workers.across(replicas)
    own = data.shard(process.size, process.rank).batch(BATCH // process.size)
    return {"x": own}


def fit(model, preemption, data, *callbacks):
    model.fit(**data, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[*callbacks, preemption])


def expected_weights(data):
    """Those of one process that nobody interrupts, with the layer of Keras and whole batches."""
    model = make(keras.layers.BatchNormalization(momentum=0.8), distribute=False, run_eagerly=True)
    model.fit(**data, epochs=EPOCHS, shuffle=False, verbose=0)
    return model.get_weights(), model.optimizer


def assert_same(model, expected):
    weights, optimizer = expected
    for ours, theirs in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    assert int(model.optimizer.iterations.numpy()) == int(optimizer.iterations.numpy())


def interrupt(replicas, folder, data, at, sends):
    """Trains until a process gets a signal; says how many steps were made before."""
    with _scope(replicas):
        model = make(syncbn.SyncBatchNormalization(momentum=0.8))
    preemption = training.PreemptionCheckpoint(folder)
    signals = [Signal(*at)] if sends else []
    with pytest.raises(SystemExit) as ended:
        fit(model, preemption, data(preemption), *signals)
    assert ended.value.code == 75
    return model


@pytest.mark.parametrize("order", ["by numbers", "as they come"])
def test_it_goes_on_as_if_nobody_had_interrupted_it(replicas, folder, order, capfd):
    last = workers.across(replicas).size - 1
    sends = _rank(replicas) == last

    def data(preemption, alone=False):
        if order == "by numbers":
            return by_numbers(preemption, contextlib.nullcontext() if alone else _scope(replicas))
        return as_they_come(replicas, alone)

    alone = training.PreemptionCheckpoint(folder / "none", communicator="local")
    expected = expected_weights(data(alone, alone=True))
    interrupt(replicas, folder / "job", data, (1, 2), sends)
    if _rank(replicas) == 0:
        assert "saved epoch 2, after 3 of its steps" in capfd.readouterr().err
    # One process alone, from a copy of its own.
    own = folder / f"alone-{_rank(replicas)}"
    shutil.copytree(folder / "job", own)
    model = make(syncbn.SyncBatchNormalization(momentum=0.8, communicator="local"), False)
    preemption = training.PreemptionCheckpoint(own, communicator="local")
    fit(model, preemption, data(preemption, alone=True))
    assert_same(model, expected)
    # All of them.
    with _scope(replicas):
        model = make(syncbn.SyncBatchNormalization(momentum=0.8))
    for epochs_left in [*range(1, EPOCHS)], []:
        preemption = training.PreemptionCheckpoint(folder / "job")
        fit(model, preemption, data(preemption))
        assert model.history.epoch == epochs_left
        assert_same(model, expected)


def test_a_checkpoint_that_cannot_be_written_is_an_error_on_all(replicas, folder):
    with _scope(replicas):
        model = make(syncbn.SyncBatchNormalization())
    processes = job_of(model).workers()
    if processes.rank == 0:
        (folder / "file").write_text("")
    all_gather(processes, np.zeros(1), "written")
    preemption = training.PreemptionCheckpoint(folder / "file", every=1)
    assert preemption.restore(model, model.optimizer) == (0, 0)
    message = "must be written to" if processes.rank == 0 else "an error on rank 0, which reports"
    with pytest.raises(RuntimeError, match=message):
        preemption.step(0, 1)


def test_workers_that_see_different_checkpoints_are_told(replicas, folder):
    with _scope(replicas):
        model = make(syncbn.SyncBatchNormalization())
    processes = job_of(model).workers()
    if processes.size == 1:
        pytest.skip("one process")
    own = folder / str(processes.rank)
    if processes.rank == processes.size - 1:
        (own / "checkpoint-3").mkdir(parents=True)
        (own / "checkpoint-3" / "progress.json").write_text('{"epoch": 1, "batch": 2}')
    numbers = ", ".join(["0"] * (processes.size - 1) + ["3"])
    with pytest.raises(ValueError, match=f"Received: number {numbers} on ranks"):
        training.PreemptionCheckpoint(own).restore(model, model.optimizer)


def _rank(replicas):
    if isinstance(replicas, Strategy) and not isinstance(replicas, Nested):
        resolver = replicas.strategy.cluster_resolver
        return (resolver.task_id or 0) if resolver else 0
    return workers.across(replicas).rank
