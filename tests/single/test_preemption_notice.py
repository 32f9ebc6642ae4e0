"""The signals of a job that may be told to end: who hears of them, and when."""

import contextlib
import os
import signal

import numpy as np
import pytest
import tensorflow as tf

from syncbn import training
from syncbn._src.training import preemption_notice
from syncbn._src.training.preemption_notice import PreemptionNotice
from tests.keras import keras
from tests.kinds_of_replicas import Threads
from tests.preemption_jobs import Fails, compiled, fit


def test_workers_ask_after_as_many_steps_and_hear_at_the_same(monkeypatch):
    # A second of PERIOD has 20 of these steps; one worker is slower in some than the other.
    now = [0.0, 0.0]
    replicas = Threads(2)
    notices = [PreemptionNotice([signal.SIGTERM]) for _ in range(2)]
    asked = [[], []]

    def worker(rank, step):
        def clock():
            return now[rank]

        notice = notices[rank]
        monkeypatch.setattr(preemption_notice.time, "monotonic", lambda: now[0])
        before = notice._asked
        heard = notice.heard(replicas.communicator(rank))
        if notice._asked != before:
            asked[rank].append(step)
        return tf.constant(len(heard))

    found = []
    for step in range(200):
        now[0] += 0.05
        if step == 150:
            notices[1]._receive(signal.SIGTERM, None)
        results = replicas.run(worker, [0, 1], [[step], [step]])
        found.append({int(result) for result in results.values()})
        if found[-1] == {1}:
            break
    assert all(len(one) == 1 for one in found)
    assert asked[0] == asked[1]
    assert 150 <= len(found) - 1 <= 171
    assert 10 <= len(asked[0]) <= 16  # of 150 steps: 7.5 s, and the doubling at the start


def test_forked_processes_end_by_the_signals_that_the_job_catches():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    notice = PreemptionNotice([signal.SIGTERM])
    notice.listen()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == notice._receive
    finally:
        notice.stop()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def received():
    """The signals that come to what caught them before."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_a_signal_after_a_fit_that_failed_goes_to_what_caught_it_before(tmp_path, received):
    with pytest.raises(RuntimeError, match="a callback failed"):
        fit(compiled("sgd"), Fails(1), training.PreemptionCheckpoint(tmp_path))
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_signal_after_a_save_that_failed_goes_to_what_caught_it_before(tmp_path, received):
    preemption = training.PreemptionCheckpoint(tmp_path / "a file" / "folder")
    (tmp_path / "a file").touch()
    told = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(RuntimeError, match="must be written"):
        fit(compiled("sgd"), told, preemption)
    assert not received
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


@pytest.mark.parametrize("fails", [True, False])
def test_a_handler_above_ours_passes_signals_on(tmp_path, received, fails):
    above = []

    def chain(number, frame):
        above.append(number)
        ours(number, frame)

    preemption, model = training.PreemptionCheckpoint(tmp_path), compiled("sgd")
    preemption.restore(model, model.optimizer)
    if fails:  # in a call that is over
        preemption._notice._within = (0, chain.__code__)
    ours = signal.signal(signal.SIGTERM, chain)
    if not fails:
        preemption.finish(1)
    for times in 1, 2:
        signal.raise_signal(signal.SIGTERM)
        assert above == received == [signal.SIGTERM] * times


@pytest.mark.parametrize("told", [False, True])
def test_what_other_callbacks_set_at_the_end_is_saved(told, tmp_path, received):
    def end(logs):
        model.set_weights([weight + 1 for weight in model.get_weights()])
        if told:
            signal.raise_signal(signal.SIGTERM)

    model, other = compiled("sgd"), compiled("sgd")
    best = keras.callbacks.LambdaCallback(on_train_end=end)
    with pytest.raises(SystemExit) if told else contextlib.nullcontext():
        fit(model, best, training.PreemptionCheckpoint(tmp_path))
    fit(other, training.PreemptionCheckpoint(tmp_path))
    for there, here in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(here, there)


def test_a_signal_behind_the_last_question_is_not_lost(tmp_path, received):
    def tell(logs):
        signal.raise_signal(signal.SIGTERM)

    model = compiled("sgd")
    late = keras.callbacks.LambdaCallback(on_train_end=tell)
    preemption = training.PreemptionCheckpoint(tmp_path)
    with pytest.raises(SystemExit) as ended:
        fit(model, late, preemption)
    assert ended.value.code == 75
    assert not received
    # Where somebody has caught the exit, the next one is another.
    fit(compiled("sgd"), preemption, epochs=3)
    preemption._notice.listen()
    signal.raise_signal(signal.SIGTERM)
    preemption._notice.stop()
    assert received == [signal.SIGTERM]
