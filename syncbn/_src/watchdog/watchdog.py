"""The thread that sees to it that no rank waits for ever.

Each rank says to a store on rank 0's host what it is at. One that waits in a collective learns
there which others are not in it, what they are at instead, and whether they have ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from syncbn._src.watchdog.flight_recorder import RECORDER, Waiting
from syncbn._src.watchdog.kill_timer import KillTimer, own_kill_timer
from syncbn._src.watchdog.messages import ENDED, EXIT_CODE, call_text, description, tell_user
from syncbn._src.watchdog.rank_store import KEY_LENGTH, TIMEOUT, Store, StoreClient, own_addresses
from syncbn._src.watchdog.waiting_for_all import within_limits
from syncbn._src.watchdog.waiting_limits import Limits, is_on, limits

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds that a rank waits for what may be under way: the last messages of one that has ended, or
where one is that it has asked."""
_ROOM = 60.0
"""Seconds beyond its limit after which a process is killed that looks no more: a look may take long
where the store does not answer."""
_FRAMES = 12
"""Frames of a stack that are shown."""


class WatchedJob(NamedTuple):
    """What the watchdog has to know of an engine's job."""

    engine: str
    rank: int
    size: int
    one_host: bool
    """Whether all ranks are on this machine."""
    share: Callable[[bytes | None], bytes]
    """Gives the bytes of rank 0 to all ranks; the others pass ``None``."""
    addresses: tuple[str, ...] = ()
    """Names by which the others know rank 0's machine, where the engine has some."""
    share_in_thread: bool = True
    """Whether `share` may be called from the watchdog's thread, whenever ranks come to it."""
    end: Callable[[int], object] = os._exit
    """Ends this process, and with it the job unless that goes on without it, with a code."""
    notices_loss: float | None = None
    """Where the job goes on without a rank that is lost: for how many seconds a rank may wait in a
    collective until it notices."""


class Watchdog(threading.Thread):
    """Watches one process of a job; see `watch_job`."""

    def __init__(self, job: WatchedJob):
        super().__init__(name="syncbn-watchdog", daemon=True)
        self.job = job
        self.limits: Limits | None = None
        """Those of rank 0, once they are known; ``None`` where it has the watchdog turned off."""
        self._main, self._process = threading.main_thread().ident, os.getpid()
        self._client: StoreClient | None = None
        self._lock = threading.Lock()
        self._where: dict[str, Any] = {}
        self._status = "running"
        self._stopped = threading.Event()
        self._stopped_wait = threading.Event()
        """That of the thread that watches the wait for the first call."""
        self._polled = 0.0
        """Seconds that the last look at the recorder took."""
        self._asked: str | None = None
        self._gone: dict[int, dict[str, Any]] = {}
        self._warned: tuple[str, int] | None = None
        self._overdue: tuple[str, int] | None = None
        self._reset: Waiting | None = None
        self._kill_timer: KillTimer | None = None
        self._reached = False
        """Whether the store has ever answered."""
        self._done: Any = None
        """What was done of collectives when the store was found out of reach last."""
        self._untold = False
        """Whether nobody could tell this rank that others wait for it: see `_may_hang_untold`."""
        self._store: Store | None = None
        if not job.share_in_thread:
            self._learn_address()

    def run(self) -> None:
        try:
            if self.job.share_in_thread:
                self._learn_address()
            while self.limits is not None and not self._stopped.is_set():
                self._look(self.limits)
                # A process with thousands of operations to look at is not held up by that.
                self._stopped.wait(max(PERIOD, 20 * self._polled))
        except Exception as error:  # of an engine or an interpreter that goes down, anything
            if not self._stopped.is_set():
                tell_user(f"the watchdog of rank {self.job.rank} has ended: {error!r}")
        finally:
            self._let_live()

    def _learn_address(self) -> None:
        """Learns from rank 0 where its store is, and the limits. All ranks take part."""
        own = self._own_address() if self.job.rank == 0 else None
        # From a thread this is no wait of the job's, unless it waits in a call of its own.
        waited = _seconds_in_any if self.job.share_in_thread else None
        end = self.job.end
        with within_limits("make their first synchronized call", end, waited) as self._stopped_wait:
            try:
                where = json.loads(self.job.share(own))
            except BaseException:
                self.close()
                raise
        if "error" in where:
            raise ValueError(where["error"])
        if where:
            # As infinity is no JSON.
            self.limits = Limits(*(one or float("inf") for one in where["limits"]))
            self._where = where
            if self.job.notices_loss is not None:
                self._kill_timer = self._own_kill_timer()

    def _own_kill_timer(self) -> KillTimer | None:
        try:
            return own_kill_timer()
        except OSError as error:  # as of a limit on them; the others wait for this rank
            tell_user(f"rank {self.job.rank} would not be ended where it is stopped: {error}")
            return None

    def _own_address(self) -> bytes:
        if not is_on():
            return b"{}"
        try:
            seconds = [0 if one == float("inf") else one for one in limits()]
        except ValueError as error:
            return json.dumps({"error": str(error)}).encode()
        key = os.urandom(KEY_LENGTH)
        self._store = Store(key, self.job.size, self.job.one_host)
        addresses = [*self.job.addresses, *own_addresses()]
        where = {
            "addresses": ["127.0.0.1"] if self.job.one_host else addresses,
            "port": self._store.port,
            "key": key.hex(),
            "limits": seconds,
        }
        return json.dumps(where).encode()

    def _look(self, limits: Limits) -> None:
        # Before all that may take for ever.
        if self._kill_timer is not None and not (self._untold or self._stopped.is_set()):
            self._kill_timer.set(limits.end + _ROOM)
        begin = time.monotonic()
        waiting = self._reset or RECORDER.waiting()
        self._polled = time.monotonic() - begin
        waited = _seconds_in(waiting)
        # Asked for before it is to be told.
        asks = waited > min(GRACE, limits.warn - 2 * PERIOD)
        asked_before = self._asked
        answer = self._exchange(waiting, asks)
        if self._asked is not None and asked_before is None:
            answer = self._exchange(waiting, asks)  # now, with what somebody asks for
        if self._stopped.is_set():  # meanwhile; this is of a job that was
            return
        self._untold = self._may_hang_untold(waiting, answer)
        if answer.get("end"):
            self._end(answer["end"]["reason"], told=True)
        if answer.get("leave"):
            self._leave_job(answer["leave"])
        if waiting is None:
            return
        gone = [one for rank, one in self._gone.items() if _takes_part(rank, waiting)]
        if gone and waited > GRACE and self.job.notices_loss is None:
            self._end(self._sentence(waiting, gone))
        missing = answer.get("missing", [{"rank": 0, "status": "silent"}])
        if waited > limits.end:
            self._wait_no_longer(waiting, missing, limits.end)
        call = (waiting.name, waiting.call)
        # A rank that was asked where it is may be slow to say so, on a busy machine.
        unheard = any(one.get("status") == "running" and "stack" not in one for one in missing)
        if waited > limits.warn + GRACE * unheard and self._warned != call:
            self._warned = call
            tell_user(self._sentence(waiting, missing))
            for one in missing:
                if one.get("stack"):
                    tell_user(f"rank {one['rank']} is at:\n{one['stack']}")

    def _may_hang_untold(self, waiting: Waiting | None, answer: dict[str, Any]) -> bool:
        """Says whether this rank may be one that hangs, with no store left that would have it end.

        One that waits does not, also in a reset, where the store that was has ended; nor does one
        whose collectives go on, or one that goes on alone after rank 0 is done.
        """
        self._reached |= bool(answer)
        ended = self._gone.get(0, {}).get("status") == ENDED
        if answer or waiting is not None or not self._reached or ended:
            return False
        done_before, self._done = self._done, (RECORDER.last(), RECORDER.counts())
        return self._done == done_before

    def _wait_no_longer(
        self, waiting: Waiting, missing: list[dict[str, Any]], limit: float
    ) -> None:
        """Ends the job, or has those end that are in no collective, where it goes on without."""
        reason = f"{self._sentence(waiting, missing)}, the limit of {limit:g} s"
        if self.job.notices_loss is None:
            self._end(reason)
            return
        self._exchange(waiting, overdue=reason)
        call = (waiting.name, waiting.call)
        if self._overdue != call and any(map(_lets_wait, missing)):
            self._overdue = call
            tell_user(f"{reason}. The job goes on without those that do not come")
        # In a reset, for new ranks, the engine waits as long as it is told to.
        last = limit + _ROOM + 2 * self.job.notices_loss
        if self._reset is None and _seconds_in(waiting) > last:
            self._end(f"{self._sentence(waiting, missing)}, and the job has not gone on without")

    def _exchange(
        self,
        waiting: Waiting | None = None,
        asks: bool = False,
        end: str | None = None,
        overdue: str | None = None,
    ) -> dict[str, Any]:
        """Tells the store what this rank is at; returns the answer, empty where there is none."""
        state: dict[str, Any] = {
            "rank": self.job.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "status": self._status,
            "waiting": None if waiting is None else [waiting.name, waiting.call],
            "members": None if waiting is None else waiting.members,
            "last": RECORDER.last(),
            "now": time.time(),
            "asks": asks,
            "overdue": overdue,
        }
        if end is not None:
            state["end"] = {"rank": self.job.rank, "reason": end}
        if self._asked is not None:
            done = RECORDER.counts().get(self._asked)
            state |= {"stack": _stack(self._main), "done": [self._asked, done]}
        with self._lock:  # the main thread tells of its end
            answer = self._answer(state)
        self._asked = answer.get("asked")
        self._gone |= {one["rank"]: one for one in answer.get("gone", ())}
        return answer

    def _answer(self, state: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._client is None and self._where:
                key = bytes.fromhex(self._where["key"])
                self._client = StoreClient(self._where["addresses"], self._where["port"], key)
            return self._client.say(state) if self._client else {}
        except (OSError, ValueError):
            # Whatever of an answer still comes is of no use: the next time, another connection.
            if self._client is not None:
                self._client.close()
            self._client = None
            return {}

    def leave(self) -> None:
        """Tells the others that this rank is done, and stops.

        Registered once the engine has started, it comes before the engine's own end, in which
        Horovod waits for the others, and these learn of nothing but a failed collective.
        """
        if os.getpid() == self._process and self.is_running():
            self.tell(ENDED)
        self.stop()

    def stop(self) -> None:
        """Ends the thread: one that runs TensorFlow while Python ends may never come back."""
        self._stopped.set()
        self._stopped_wait.set()
        self._let_live()
        self.join(TIMEOUT)

    def close(self) -> None:
        """Ends the store, if it is in this process."""
        if self._store is not None:
            self._store.close()

    def wait_for_reset(self) -> None:
        """Tells the others from now on that this rank waits for them, to be in a job anew."""
        self._reset = Waiting("the reset of the job", 1, time.time(), None)

    def _let_live(self) -> None:
        if self._kill_timer is not None:
            self._kill_timer.unset()

    def is_running(self) -> bool:
        """Says whether nothing has been told of an end yet."""
        return self._status == "running"

    def tell(self, status: str) -> None:
        """Tells the others that this rank ends, and how."""
        self._status = status
        self._exchange()
        self._let_others_hear()

    def _let_others_hear(self) -> None:
        """Waits until the others know what the store would tell them, if it ends with this rank."""
        if self._store is not None:
            self._store.wait_until_heard(3 * PERIOD)

    def say_who_is_gone(self) -> None:
        """Says which other ranks have ended: an engine's own error seldom names them."""
        time.sleep(PERIOD)  # the last words of a process that is gone may be under way
        self._exchange()
        for one in self._gone.values():
            tell_user(description(one))

    def _end(self, reason: str, told: bool = False) -> None:
        """Ends this process, and lets the other ranks know, unless they have told it to."""
        file = self._write_record(reason)
        tell_user(f"{reason}. The job ends; this rank's record is in {file}")
        if not told:
            self._exchange(end=reason)
            time.sleep(2 * PERIOD)  # the others write their records
        sys.stdout.flush()
        self.job.end(EXIT_CODE)

    def _leave_job(self, reason: str) -> None:
        """Ends this process; the others go on."""
        file = self._write_record(reason)
        tell_user(f"{reason}. The others go on without this rank, whose record is in {file}")
        self._let_others_hear()  # of whom others may have to leave too
        sys.stdout.flush()
        self.job.end(EXIT_CODE)

    def _write_record(self, reason: str) -> Path:
        waiting = RECORDER.waiting()
        folder = Path(os.environ.get("SYNCBN_RECORDS", "."))
        file = folder / f"syncbn-record-{self.job.engine}-{self.job.rank}-{os.getpid()}.json"
        record = {
            "engine": self.job.engine,
            "rank": self.job.rank,
            "size": self.job.size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "reason": reason,
            "waiting": None if waiting is None else waiting._asdict(),
            "stack": _stack(self._main),
            **RECORDER.as_json(),
        }
        try:
            file.write_text(json.dumps(record, indent=1))
        except OSError as error:
            tell_user(f"rank {self.job.rank} cannot write its record: {error}")
        return file

    def _sentence(self, waiting: Waiting, missing: list[dict[str, Any]]) -> str:
        """Says in which collective this rank waits, and what the others are at."""
        seconds = time.time() - waiting.since
        where = call_text(waiting.name, waiting.call)
        own = f"rank {self.job.rank} has waited {seconds:.0f} s in {where}"
        if not missing:
            return f"{own}, in which all ranks are"
        return f"{own}; " + "; ".join(map(description, missing))


def to_array(message: bytes | None) -> np.ndarray:
    """Returns a message as engines send it: of one length, zeros where there is none."""
    array = np.zeros(4096, np.uint8)
    if message is not None:
        array[: len(message)] = np.frombuffer(message, np.uint8)
    return array


def to_bytes(array: np.ndarray) -> bytes:
    """Returns the message that `to_array` has made an array of."""
    return array.tobytes().rstrip(b"\0")


def _seconds_in_any() -> float:
    return _seconds_in(RECORDER.waiting())


def _seconds_in(waiting: Waiting | None) -> float:
    return 0.0 if waiting is None else time.time() - waiting.since


def _takes_part(rank: int, waiting: Waiting) -> bool:
    return waiting.members is None or rank in waiting.members


def _lets_wait(one: dict[str, Any]) -> bool:
    """Says whether a rank that is not in a call is there, and does not wait itself."""
    status = one.get("status")
    return status == "silent" or (status == "running" and not one.get("waiting"))


def _stack(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    return "".join(traceback.format_stack(frame)[-_FRAMES:]) if frame else ""


_watchdog: Watchdog | None = None


def watch_job(job: WatchedJob) -> None:
    """Watches this process from now on, where its job has several; once. All ranks call it."""
    global _watchdog
    if _watchdog is None and job.size > 1:
        _watchdog = Watchdog(job)
        _watchdog.start()
        atexit.register(_watchdog.leave)


@contextlib.contextmanager
def within_reset() -> Iterator[None]:
    """Within, this process leaves its job for another one, for which it may wait.

    The watchdog ends with it, and what was recorded of the job that was is forgotten.
    """
    global _watchdog
    if _watchdog is not None:
        _watchdog.wait_for_reset()
    yield
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog.close()
        atexit.unregister(_watchdog.leave)
        _watchdog = None
    RECORDER.begin_anew()


def described(several: bool) -> str:
    """Says in words whether this process is watched; ``several``: whether its job has others."""
    if not several:
        return "not needed, since one process has all replicas"
    if _watchdog is None or _watchdog.limits is None:
        return "off" + ("" if is_on() else " (SYNCBN_WATCHDOG=0)")
    warn, end = _watchdog.limits
    told = "never" if warn == float("inf") else f"after {warn:g} s"
    ended = "never" if end == float("inf") else f"after {end:g} s"
    then = "ends the job" if _watchdog.job.notices_loss is None else "goes on without the missing"
    return f"on; a rank that waits says so {told}, and {then} {ended}"


def current() -> Watchdog | None:
    """Returns what watches this process, if anything does."""
    return _watchdog
