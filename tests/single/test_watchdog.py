"""The watchdog's parts: the store of what ranks are at, its timers and limits, and `diagnose`."""

import contextlib
import io
import json
import re
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from syncbn._src import cli
from syncbn._src.watchdog import kill_timer, waiting_limits, watchdog
from syncbn._src.watchdog.flight_recorder import FlightRecorder
from syncbn._src.watchdog.messages import description
from syncbn._src.watchdog.rank_store import TIMEOUT, Store, StoreClient, _Codec
from syncbn._src.watchdog.waiting_for_all import starting_within_limits, within_limits
from tests import patience, processes

KEY = bytes(range(32))


def state(rank, **more):
    return {
        **{"rank": rank, "status": "running", "waiting": ["a", 1], "members": None},
        **{"asks": True, **more},
    }


@pytest.fixture
def store():
    return Store(KEY, 3, loopback=True)


@pytest.fixture
def client(store):
    """Makes connections of ranks."""
    with contextlib.ExitStack() as stack:

        def connect(key=KEY):
            return stack.enter_context(
                contextlib.closing(StoreClient(["127.0.0.1"], store.port, key))
            )

        yield connect


def test_ranks_learn_who_is_not_in_their_call(client):
    first, second = client(), client()
    assert [one["rank"] for one in first.say(state(0))["missing"]] == [1, 2]
    assert [one["rank"] for one in second.say(state(1))["missing"]] == [2]
    second.say(state(1, waiting=["b", 1]))
    other, silent = first.say(state(0))["missing"]
    assert (other["rank"], other["status"], other["waiting"]) == (1, "running", ["b", 1])
    assert silent == {"rank": 2, "status": "silent"}


def test_a_rank_is_silent_after_a_while_and_lost_where_it_has_no_connection(store, client):
    first, second = client(), client()
    second.say(state(1, waiting=None))

    def second_said(seconds_ago):
        store._heard[1] = time.monotonic() - seconds_ago
        (found, _) = first.say(state(0))["missing"]
        return found["status"], found.get("silent", 0.0) >= seconds_ago

    assert second_said(0.0) == ("running", True)
    assert second_said(1.5 * TIMEOUT) == ("silent", True)
    assert second_said(3 * TIMEOUT) == ("silent", True)
    second.close()
    patience.soon(lambda: 1 not in store._connections)
    assert second_said(1.5 * TIMEOUT) == ("silent", True)
    assert second_said(3 * TIMEOUT) == ("lost", True)


def test_only_those_count_that_take_part(client):
    first, second = client(), client()
    second.say(state(1, waiting=None))
    assert first.say(state(0, members=[0, 2]))["missing"] == [{"rank": 2, "status": "silent"}]


def test_a_large_job_is_told_of_a_few(client):
    store = Store(KEY, 1024, loopback=True)
    with contextlib.closing(StoreClient(["127.0.0.1"], store.port, KEY)) as one:
        missing = one.say(state(0))["missing"]
    assert len(missing) == 9
    assert missing[-1] == {"rank": None, "more": 1015}


def test_a_stack_comes_when_somebody_asks_and_is_kept(client):
    first, second = client(), client()
    assert second.say(state(1, asks=False))["asked"] is None
    first.say(state(0))
    assert second.say(state(1, asks=False, waiting=None))["asked"] == "a"
    second.say(state(1, asks=False, waiting=None, stack="here"))
    second.say(state(1, asks=False, waiting=None))
    assert first.say(state(0))["missing"][0]["stack"] == "here"


def test_an_end_is_told_to_all(client):
    first, second = client(), client()
    assert second.say(state(1))["end"] is None
    first.say(state(0, end={"rank": 0, "reason": "enough"}))
    assert second.say(state(1))["end"] == {"rank": 0, "reason": "enough"}


def test_those_leave_that_let_others_wait_too_long_and_no_others(client):
    waiting, calculating, elsewhere = client(), client(), client()
    assert calculating.say(state(1, waiting=None))["leave"] is None
    elsewhere.say(state(2, waiting=["b", 7]))
    waiting.say(state(0))
    assert calculating.say(state(1, waiting=None))["leave"] is None
    assert waiting.say(state(0, overdue="15 s in a"))["leave"] is None
    assert elsewhere.say(state(2, waiting=["b", 7]))["leave"] is None
    # Once it is decided, it is; the others may have gone on without.
    assert calculating.say(state(1))["leave"] == "15 s in a"


def test_who_has_ended_or_takes_no_part_does_not_have_to_leave(client):
    waiting, ended, other = client(), client(), client()
    ended.say(state(1, status="has ended", waiting=None))
    other.say(state(2, waiting=None))
    waiting.say(state(0, overdue="too long", members=[0, 1]))
    assert other.say(state(2, waiting=None))["leave"] is None
    assert ended.say(state(1, status="has ended", waiting=None))["leave"] is None


def test_a_store_that_is_closed_answers_nobody(client, store):
    first, quiet = client(), client()
    first.say(state(0))
    store.close()
    with pytest.raises(ConnectionError):
        patience.soon(lambda: first.say(state(0)) is None)
    with pytest.raises(ConnectionError):
        quiet.say(state(1))
    with pytest.raises(ConnectionError):
        StoreClient(["127.0.0.1"], store.port, KEY)


def test_who_has_ended_says_so_and_nobody_else_has(client):
    first, second = client(), client()
    second.say(state(1))
    assert first.say(state(0))["gone"] == []
    second.close()
    assert first.say(state(0))["gone"] == []
    client().say(state(1, status="has ended"))
    (gone,) = first.say(state(0))["gone"]
    assert (gone["rank"], gone["status"]) == (1, "has ended")


@pytest.mark.parametrize("status", ["running", "has failed: ValueError"])
def test_a_store_that_ends_waits_until_the_others_have_heard(client, store, status):
    first, second, third = client(), client(), client()
    second.say(state(1, status=status))
    third.say(state(2, status="has ended"))
    first.say(state(0, status="has ended"))
    much = 10 * patience.limit()
    waits = threading.Thread(target=store.wait_until_heard, args=(much,), daemon=True)
    waits.start()
    third.close()  # this one asks no more
    time.sleep(0.2)
    assert waits.is_alive()
    assert 0 in {one["rank"] for one in second.say(state(1, status=status))["gone"]}

    def over():
        second.say(state(1, status=status))  # once more if it did not wait yet
        return not waits.is_alive()

    patience.soon(over)


def test_who_has_not_the_key_neither_reads_nor_writes(client):
    stranger = client(bytes(32))
    with pytest.raises(ConnectionError):
        stranger.say(state(1))
    assert client().say(state(0))["missing"][0] == {"rank": 1, "status": "silent"}


def test_what_was_said_once_is_not_taken_twice(store):
    with socket.create_connection(("127.0.0.1", store.port), 60) as one:
        one.sendall(bytes(16))
        nonce = one.recv(16) + bytes(16)
        message = _Codec(KEY, nonce, b"to").seal(state(2))
        one.sendall(message)
        assert one.recv(1 << 16)
        one.sendall(message)
        assert one.recv(1 << 16) == b""


def test_a_message_that_is_too_long_is_not_read(store):
    with socket.create_connection(("127.0.0.1", store.port), 60) as one:
        one.recv(16)
        one.sendall(bytes(16) + b"\xff\xff\xff\xff")
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


# The module alone: the package would bring TensorFlow.
_TIMED = f"""
import ctypes, os, runpy, signal, sys, time
timer = runpy.run_path({kill_timer.__file__!r})["KillTimer"]()
timer.set(1)
{{then}}
print("lives")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the timer is Linux's")
@pytest.mark.parametrize(
    ("then", "killed"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", True),
        ("ctypes.PyDLL(None).sleep(1000)", True),
        ("timer.set(1000)\ntime.sleep(2)", False),
        ("timer.unset()\ntime.sleep(2)", False),
        (
            "if os.fork():\n    timer.unset()\n    assert os.wait()[1] == 0\n"
            "else:\n    time.sleep(2)\n    os._exit(0)",
            False,
        ),
    ],
    ids=["stopped", "no-thread-runs", "set-anew", "unset", "a-child-has-none"],
)
def test_a_process_that_does_not_look_any_more_is_killed_by_its_timer(then, killed):
    finished = processes.python(_TIMED.format(then=then))
    assert finished.code == (-9 if killed else 0), finished.output
    assert ("lives" in finished.output) != killed


@pytest.fixture
def elastic_rank(monkeypatch):
    """Makes the watchdog of a rank whose job goes on without others, and ends no process."""
    recorder, stack = FlightRecorder(), contextlib.ExitStack()
    monkeypatch.setattr(watchdog, "RECORDER", recorder)

    def rank(number, store=None):
        shared, ended = [], []

        def share(own):
            shared.append(json.loads(own) if own else {})
            if store is not None:
                where = {"addresses": ["127.0.0.1"], "port": store.port, "key": KEY.hex()}
                own = json.dumps({**where, "limits": [30, 600]}).encode()
            return own

        job = watchdog.WatchedJob("horovod", number, 3, True, share, share_in_thread=False)
        one = watchdog.Watchdog(job._replace(end=ended.append, notices_loss=30.0))
        stack.callback(lambda: one._client and one._client.close())
        stack.callback(one.close)
        return SimpleNamespace(watchdog=one, recorder=recorder, where=shared[0], ended=ended)

    with stack:
        yield rank


@pytest.fixture
def seconds_set(monkeypatch):
    """What the kill timer is set to, and not the timer."""
    found = []
    timer = SimpleNamespace(set=found.append, unset=lambda: found.append(None))
    monkeypatch.setattr(watchdog, "own_kill_timer", lambda: timer)
    return found


def test_rank_zero_leaves_once_others_that_leave_know_it(
    elastic_rank, seconds_set, monkeypatch, tmp_path
):
    monkeypatch.setenv("SYNCBN_RECORDS", str(tmp_path))
    monkeypatch.setattr(watchdog, "PERIOD", patience.limit())
    zero = elastic_rank(0)
    with contextlib.ExitStack() as stack:
        address = ["127.0.0.1"], zero.where["port"], bytes.fromhex(zero.where["key"])
        other, waits = (
            stack.enter_context(contextlib.closing(StoreClient(*address))) for _ in "ab"
        )
        zero.watchdog._exchange()
        assert other.say(state(1, waiting=None))["leave"] is None
        waits.say(state(2, overdue="too long"))
        look = threading.Thread(target=zero.watchdog._look, args=(waiting_limits.Limits(30, 600),))
        look.start()
        patience.soon(lambda: list(tmp_path.iterdir()))
        time.sleep(0.2)
        assert not zero.ended
        assert other.say(state(1, waiting=None))["leave"] == "too long"
        patience.soon(lambda: (other.say(state(1)), waits.say(state(2)), zero.ended)[-1] == [70])
        look.join()


def test_who_may_hang_and_cannot_be_told_is_left_to_its_timer(elastic_rank, seconds_set, store):
    one = elastic_rank(1, store)

    def renewed():
        seconds_set.clear()
        one.watchdog._look(waiting_limits.Limits(30, 600))
        return seconds_set == [660]

    assert renewed()
    store.close()
    # It takes a look to see that the store is gone, and one to see that nothing goes on.
    patience.soon(lambda: not renewed())
    assert not renewed()
    with one.recorder.enter("goes on", None):
        pass
    renewed()
    assert renewed()
    assert not renewed()
    with one.recorder.enter("waits", None):
        renewed()
        assert all(renewed() for _ in range(3))
    patience.soon(lambda: not renewed())
    one.watchdog.wait_for_reset()
    renewed()
    assert all(renewed() for _ in range(3))
    one.watchdog._stopped.set()
    assert not renewed()


def test_who_goes_on_alone_after_rank_zero_is_done_does_not_hang(elastic_rank, seconds_set, store):
    one = elastic_rank(1, store)
    with contextlib.closing(StoreClient(["127.0.0.1"], store.port, KEY)) as zero:
        zero.say(state(0, status="has ended", waiting=None))
        one.watchdog._look(waiting_limits.Limits(30, 600))
    store.close()
    seconds_set.clear()
    for _ in range(5):
        one.watchdog._look(waiting_limits.Limits(30, 600))
    assert seconds_set == [660] * 5


def test_a_job_goes_on_where_there_is_no_timer(elastic_rank, store, monkeypatch, capfd):
    def none_left():
        raise OSError(11, "timer_create")

    monkeypatch.setattr(watchdog, "own_kill_timer", none_left)
    elastic_rank(1, store).watchdog._look(waiting_limits.Limits(30, 600))
    assert "rank 1 would not be ended where it is stopped" in capfd.readouterr().err


def test_without_a_watchdog_there_is_no_timer(elastic_rank, monkeypatch):
    monkeypatch.setattr(watchdog, "own_kill_timer", lambda: pytest.fail("a timer"))
    monkeypatch.setenv("SYNCBN_WATCHDOG", "0")
    assert elastic_rank(0).watchdog.limits is None


@pytest.mark.skipif(sys.platform != "linux", reason="the timer is Linux's")
@pytest.mark.parametrize(
    ("libraries", "opened"),
    [
        ({"librt.so.1": True, None: False}, ["librt.so.1"]),
        ({None: True}, ["librt.so.1", None]),
        ({"librt.so.1": False, None: False}, ["librt.so.1", None]),
        ({None: False}, ["librt.so.1", None]),
    ],
    ids=["old-glibc", "musl", "neither", "none"],
)
def test_the_timer_is_in_the_library_that_has_it(libraries, opened, monkeypatch):
    tried, calls = [], []

    def library(name, use_errno):
        tried.append(name)
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        function = {one: lambda *_, one=one: calls.append(one) for one in _TIMERS}
        return SimpleNamespace(**(function if libraries[name] else {}))

    monkeypatch.setattr(kill_timer.ctypes, "CDLL", library)
    kill_timer.KillTimer().set(5)
    assert tried == opened
    assert calls == (list(_TIMERS) if any(libraries.values()) else [])


_TIMERS = "timer_create", "timer_settime"


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


def test_a_wait_for_all_ranks_says_so_and_ends_the_job(monkeypatch, capfd):
    monkeypatch.setenv("SYNCBN_WARN_SECONDS", "0.5")
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", "1.5")
    codes, ended, seconds = [], threading.Event(), iter([1.0])

    def end(code):
        codes.append(code)
        ended.set()

    with within_limits("start", end, lambda: next(seconds, 2.0)):
        assert ended.wait(patience.limit())
    assert codes[0] == 70
    said = capfd.readouterr().err
    assert re.search(r"process \d+ on \S+ has waited 1 s for all ranks to start; at least", said)
    assert re.search(r"has waited 2 s for all ranks to start, the limit of 1\.5 s", said)


def test_a_wait_for_all_ranks_is_that_since_it_began(monkeypatch):
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", "0.1")
    ended = threading.Event()
    with within_limits("start", lambda code: ended.set()):
        assert ended.wait(patience.limit())


@pytest.mark.parametrize(("limit", "seconds"), [("0", 1e9), ("3", 1.0)])
def test_a_wait_within_the_limits_ends_nothing(monkeypatch, limit, seconds):
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", limit)
    looked, codes = threading.Semaphore(0), []

    def waited():
        looked.release()
        return seconds

    with within_limits("start", codes.append, waited):
        # At the second look, what was to be done about the first is done.
        assert all(looked.acquire(timeout=patience.limit()) for _ in range(2))
    assert not codes


def test_without_a_watchdog_no_wait_is_watched(monkeypatch):
    def started():
        before = {*threading.enumerate()}
        with within_limits("start"):
            return [one.name for one in {*threading.enumerate()} - before]

    monkeypatch.setenv("SYNCBN_WATCHDOG", "0")
    assert not started()
    monkeypatch.delenv("SYNCBN_WATCHDOG")
    assert started() == ["syncbn-waiting-for-all"]


@pytest.mark.parametrize("limit", ["600", "0", "1e10"])
def test_what_starts_may_have_no_limit_and_no_file_for_its_errors(monkeypatch, limit):
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", limit)
    with contextlib.redirect_stderr(io.StringIO()), starting_within_limits():
        pass
    monkeypatch.setattr(sys, "__stderr__", None)
    with starting_within_limits():
        pass


def test_an_engine_that_lets_no_thread_run_is_ended_with_its_stack():
    # As MPI does: sleep holds the lock when it is called through ctypes.PyDLL.
    code = """
import ctypes
from syncbn._src.watchdog.waiting_for_all import starting_within_limits
with starting_within_limits():
    ctypes.PyDLL(None).sleep(600)
"""
    finished = processes.python(code, SYNCBN_TIMEOUT_SECONDS="5")
    assert finished.code == 1, finished.output
    assert "Timeout (0:00:07)!" in finished.output
    assert 'File "<string>", line 5' in finished.output


def test_what_is_said_of_a_rank_that_is_gone_and_of_many():
    last = {"name": "norm/moments", "number": 7, "left": 10.0}
    gone = {"rank": 3, "pid": 5, "host": "one", "status": "lost", "last": last, "now": 12.0}
    assert description(gone) == (
        "rank 3 (process 5 on one) is gone without a word; it left its last one, "
        "norm/moments (call 7), 2 s before"
    )
    assert description({"rank": None, "more": 4}) == "4 more ranks are not in it"
