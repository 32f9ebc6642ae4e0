"""The watchdog's parts: the store of what ranks are at, the flight recorder, and `diagnose`."""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from syncbn._src import cli
from syncbn._src.watchdog import waiting_limits
from syncbn._src.watchdog.flight_recorder import FlightRecorder
from syncbn._src.watchdog.rank_store import Store, StoreClient, _Codec

KEY = bytes(range(32))


def state(rank, **more):
    return {"rank": rank, "status": "running", "waits": True, "asks": False, **more}


@pytest.fixture
def store():
    return Store(KEY, loopback=True)


@pytest.fixture
def client(store):
    """Makes connections of ranks."""
    with contextlib.ExitStack() as stack:

        def connect(key=KEY):
            return stack.enter_context(
                contextlib.closing(StoreClient(["127.0.0.1"], store.port, key))
            )

        yield connect


def soon(condition):
    """Waits for what another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_learn_what_the_others_are_at(client):
    first, second = client(), client()
    assert first.say(state(0))["ranks"] == []
    (other,) = second.say(state(1, waiting=["a", 1, 0.0]))["ranks"]
    assert (other["rank"], other["status"]) == (0, "running")
    (other,) = first.say(state(0))["ranks"]
    assert other["waiting"] == ["a", 1, 0.0]
    assert other["silent"] < 60


def test_a_stack_comes_when_somebody_asks_and_is_kept(client):
    first, second = client(), client()
    assert not second.say(state(1))["asked"]
    first.say(state(0, asks=True))
    assert second.say(state(1))["asked"]
    second.say(state(1, stack="here"))
    second.say(state(1))
    assert first.say(state(0))["ranks"][0]["stack"] == "here"


def test_an_end_is_told_to_all(client):
    first, second = client(), client()
    assert second.say(state(1))["end"] is None
    first.say(state(0, end={"rank": 0, "reason": "enough"}))
    assert second.say(state(1))["end"] == {"rank": 0, "reason": "enough"}


@pytest.mark.parametrize(
    ("status", "known"), [("running", "lost"), ("has ended", "has ended")], ids=["lost", "ended"]
)
def test_a_rank_that_goes_without_a_word_is_lost(client, status, known):
    first, second = client(), client()
    second.say(state(1, status=status))
    second.close()
    soon(lambda: first.say(state(0))["ranks"][0]["status"] == known)


def test_a_rank_that_comes_back_is_not_lost(client):
    first, old = client(), client()
    old.say(state(1))
    new = client()
    new.say(state(1))
    old.close()
    for _ in range(5):
        assert first.say(state(0))["ranks"][0]["status"] == "running"
        time.sleep(0.02)


def test_who_has_not_the_key_neither_reads_nor_writes(client):
    stranger = client(bytes(32))
    with pytest.raises(ConnectionError):
        stranger.say(state(7))
    assert client().say(state(0))["ranks"] == []


def test_what_was_said_once_is_not_taken_twice(store):
    with socket.create_connection(("127.0.0.1", store.port), 60) as one:
        nonce = one.recv(16)
        message = _Codec(KEY, nonce, b"to").seal(state(3))
        one.sendall(message)
        assert one.recv(1 << 16)
        one.sendall(message)
        assert one.recv(1 << 16) == b""


def test_a_message_that_is_too_long_is_not_read(store):
    with socket.create_connection(("127.0.0.1", store.port), 60) as one:
        one.recv(16)
        one.sendall(b"\xff\xff\xff\xff")
        assert one.recv(1 << 16) == b""


@pytest.mark.parametrize("given", ["soon", "-1", "nan"])
def test_limits_that_are_none_are_refused(given, monkeypatch):
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", given)
    with pytest.raises(ValueError, match=f"SYNCBN_TIMEOUT_SECONDS must be .* Received: {given}"):
        waiting_limits.limits()


def test_limits(monkeypatch):
    assert waiting_limits.limits() == (30, 600)
    monkeypatch.setenv("SYNCBN_WARN_SECONDS", "2.5")
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", "0")
    assert waiting_limits.limits() == (2.5, float("inf"))


def doubled(tensor):
    return 2 * tensor


def test_a_collective_of_a_graph_is_counted_wherever_it_is():
    recorder = FlightRecorder()

    @tf.custom_gradient
    def watched(x):
        def gradient(dy):
            return recorder.watch("backward", None, dy, doubled)

        return recorder.watch("forward", None, x, doubled), gradient

    @tf.function
    def step(x, branch):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cond(branch, lambda: watched(x), lambda: x)
        return tape.gradient(y, x)

    x = tf.ones([3])
    assert step(x, tf.constant(True)).numpy().tolist() == [2, 2, 2]
    assert step(x, tf.constant(False)).numpy().tolist() == [1, 1, 1]
    assert recorder.counts() == {"forward": 1, "backward": 1}
    assert recorder.waiting() is None


def test_a_loop_and_a_vectorized_loop_count_too():
    recorder = FlightRecorder()

    @tf.function
    def loop(x):
        for _ in tf.range(3):
            x = recorder.watch("loop", None, x, doubled)
        return x

    assert loop(tf.constant(1.0)).numpy() == 8
    assert recorder.counts()["loop"] == 3
    vectorized = tf.function(
        lambda rows: tf.vectorized_map(lambda x: recorder.watch("row", None, x, doubled), rows)
    )
    assert vectorized(tf.ones([4, 2])).numpy().tolist() == [[2, 2]] * 4
    # TensorFlow may keep the counters of what it has converted, too; what counts is that both do.
    assert recorder.counts()["row"] >= 1
    assert recorder.waiting() is None


def test_a_graph_that_waits_is_seen_from_another_thread():
    recorder, goes_on = FlightRecorder(), threading.Event()

    def wait(x):
        assert goes_on.wait(60)
        return x

    @tf.function
    def step(x):
        return recorder.watch("slow", [0, 1], x, lambda x: tf.numpy_function(wait, [x], x.dtype))

    thread = threading.Thread(target=step, args=(tf.ones([2]),))
    thread.start()
    try:
        soon(lambda: recorder.waiting() is not None)
        waiting = recorder.waiting()
        assert (waiting.name, waiting.call, waiting.members) == ("slow", 1, [0, 1])
        assert waiting.since == recorder.waiting().since
    finally:
        goes_on.set()
        thread.join()
    assert recorder.waiting() is None


def test_the_oldest_of_what_waits_is_told():
    recorder = FlightRecorder()
    done = recorder.enter("done", None)
    done.leave()
    recorder.enter("first", None)
    recorder.enter("second", None)
    assert recorder.waiting()[:2] == ("first", 2)
    assert [one["name"] for one in recorder.as_json()["collectives"]] == ["done", "first", "second"]


def test_eagerly_what_fails_is_not_left():
    recorder = FlightRecorder()
    with pytest.raises(ZeroDivisionError):
        recorder.watch("bad", None, tf.ones([1]), lambda x: 1 / 0)
    assert np.array_equal(recorder.watch("good", None, tf.ones([1]), doubled), [2])
    assert [one["left"] is None for one in recorder.as_json()["collectives"]] == [True, False]


def record(rank, waiting=None, **more):
    stack = '  File "/x/train.py", line 7, in step\n    wait()\n'
    return {
        **{"rank": rank, "size": 3, "engine": "mpi", "host": "here", "pid": 10 + rank},
        **{"time": 50.0, "reason": "it was the limit", "waiting": waiting, "stack": stack},
        **{"collectives": [{"number": 1, "name": "b", "left": 2.0}], "sites": [], **more},
    }


def test_diagnose_says_who_waited_for_whom(tmp_path, capsys):
    waiting = {"name": "a", "call": 2, "since": 10.0}
    for rank, one in ((0, waiting), (1, None)):
        (tmp_path / f"{rank}.json").write_text(json.dumps(record(rank, one)))
    assert cli.main(["diagnose", str(tmp_path / "1.json"), str(tmp_path / "0.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "0",
        "10",
        "on",
        "here",
        "a",
        "(call",
        "2)",
        "40",
        "s",
        "b",
        "(call",
        "1)",
        "/x/train.py:7",
    ]
    assert lines[2].split() == [
        "1",
        "11",
        "on",
        "here",
        "no",
        "collective",
        "b",
        "(call",
        "1)",
        "/x/train.py:7",
    ]
    assert "There is no record of rank 2" in lines[-1]
    assert "rank 0 waits in a (call 2); rank 1 is in no collective" in lines[-1]
    assert lines[-1].endswith("The job ended because it was the limit.")


def test_diagnose_refuses_what_is_no_record(tmp_path, capsys):
    file = tmp_path / "other.json"
    for text in ("[]", "{}", "no json"):
        file.write_text(text)
        assert cli.main(["diagnose", str(file)]) == 2
        assert f"diagnose needs records of ranks. Received: {file}" in capsys.readouterr().err
    file.write_text(json.dumps(record(0)))
    assert cli.main(["diagnose", str(file), str(file)]) == 2
    assert "one record of each rank" in capsys.readouterr().err
