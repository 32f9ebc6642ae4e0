"""The thread that sees to it that no rank waits for ever.

Each rank says to a store on rank 0's host what it is at. One that waits in a collective learns
there which others are not in it, what they are at instead, and whether they have ended.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from syncbn._src.watchdog.flight_recorder import RECORDER, Waiting
from syncbn._src.watchdog.rank_store import (
    KEY_LENGTH,
    TIMEOUT,
    Store,
    StoreClient,
    own_addresses,
)
from syncbn._src.watchdog.waiting_limits import is_on, limits

EXIT_CODE = 70
"""That of a process that the watchdog ends: EX_SOFTWARE of sysexits.h."""

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds that a rank waits for one that has ended, whose last messages may be under way."""
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
    share_in_thread: bool = True
    """Whether that may be called from the watchdog's thread, whenever ranks come to it."""
    end: Callable[[int], object] = os._exit
    """Ends this process, and with it the job, with a code."""


class Watchdog(threading.Thread):
    """Watches one process of a job; see `watch_job`."""

    def __init__(self, job: WatchedJob):
        super().__init__(name="syncbn-watchdog", daemon=True)
        self.job = job
        self.limits = limits()
        self._main = threading.main_thread().ident
        self._client: StoreClient | None = None
        self._where: dict[str, Any] = {}
        self._status = "running"
        self._stopped = threading.Event()
        self._asked = False
        self._store_status = "silent"
        """Why the store has not answered: ``"silent"``, or ``"lost"``."""
        self._warned: tuple[str, int] | None = None
        self._store: Store | None = None
        if not job.share_in_thread:
            self._where = self._shared_address()

    def run(self) -> None:
        if self.job.share_in_thread:
            try:
                self._where = self._shared_address()
            except Exception as error:  # of an engine that is going down, anything
                _say(f"rank {self.job.rank} does not learn what the others are at: {error}")
        while not self._stopped.is_set():
            self._look()
            self._stopped.wait(PERIOD)

    def _shared_address(self) -> dict[str, Any]:
        own = None
        if self.job.rank == 0:
            key = os.urandom(KEY_LENGTH)
            self._store = Store(key, self.job.one_host)
            addresses = ["127.0.0.1"] if self.job.one_host else own_addresses()
            where = {"addresses": addresses, "port": self._store.port, "key": key.hex()}
            own = json.dumps(where).encode()
        return json.loads(self.job.share(own))

    def _look(self) -> None:
        waiting = RECORDER.waiting()
        waited = 0.0 if waiting is None else time.time() - waiting.since
        long = waited > min(GRACE, self.limits.warn)
        # Asked for before it is to be told.
        asks = waited > self.limits.warn - 2 * PERIOD
        answer = self._exchange({"waits": long, "asks": asks}, waiting)
        if answer.get("end"):
            self._end(answer["end"]["reason"], told=True)
        if waiting is None or not long:
            return
        others = self._others(answer, waiting)
        gone = [one for one in others if one["status"] not in ("running", "silent")]
        if gone and waited > GRACE:
            self._end(self._sentence(waiting, gone))
        if waited > self.limits.end:
            missing = [one for one in others if not _is_in(one, waiting)]
            self._end(self._sentence(waiting, missing) + f", the limit of {self.limits.end:g} s")
        call = (waiting.name, waiting.call)
        if waited > self.limits.warn and self._warned != call:
            self._warned = call
            missing = [one for one in others if not _is_in(one, waiting)]
            _say(self._sentence(waiting, missing))
            for one in missing:
                if one.get("stack"):
                    _say(f"rank {one['rank']} is at:\n{one['stack']}")

    def _others(self, answer: dict[str, Any], waiting: Waiting) -> list[dict[str, Any]]:
        """Returns what is known of the other ranks that take part."""
        known = {one["rank"]: one for one in answer.get("ranks", ())}
        others = range(self.job.size) if waiting.members is None else waiting.members
        found = []
        for rank in others:
            if rank == self.job.rank:
                continue
            one = known.get(rank, {"rank": rank, "status": "silent"})
            if rank == 0 and not answer:
                # The store is in its process: gone with it, or stopped with it.
                one = {"rank": 0, "status": self._store_status}
            elif one.get("silent", 0.0) > TIMEOUT and one["status"] == "running":
                one = {**one, "status": "silent"}
            found.append(one)
        return found

    def _exchange(self, more: dict[str, Any], waiting: Waiting | None = None) -> dict[str, Any]:
        """Tells the store what this rank is at; returns the answer, empty where there is none."""
        if not self._where:
            return {}
        state = {
            "rank": self.job.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "status": self._status,
            "waiting": None if waiting is None else [waiting.name, waiting.call, waiting.since],
            "last": RECORDER.last(),
            "now": time.time(),
            "waits": False,
            "asks": False,
            **more,
        }
        if self._asked:
            state |= {"stack": _stack(self._main), "done": RECORDER.counts()}
        try:
            if self._client is None:
                where = self._where
                key = bytes.fromhex(where["key"])
                self._client = StoreClient(where["addresses"], where["port"], key)
            answer = self._client.say(state)
        except (OSError, ValueError) as error:
            # Whatever of an answer still comes is of no use: the next time, another connection.
            if self._client is not None:
                self._client.close()
            self._client = None
            self._store_status = "silent" if isinstance(error, TimeoutError) else "lost"
            return {}
        self._asked = answer["asked"]
        return answer

    def stop(self) -> None:
        """Ends the thread: one that runs TensorFlow while Python ends may never come back."""
        self._stopped.set()
        self.join(TIMEOUT)

    def is_running(self) -> bool:
        """Says whether nothing has been told of an end yet."""
        return self._status == "running"

    def tell(self, status: str) -> None:
        """Tells the others that this rank ends, and how."""
        self._status = status
        self._exchange({})

    def say_who_is_gone(self) -> None:
        """Says which other ranks have ended: an engine's own error seldom names them."""
        time.sleep(PERIOD)  # the last words of a process that is gone may be under way
        answer = self._exchange({"waits": True})
        for one in answer.get("ranks", ()):
            if one["status"] != "running":
                _say(_description(one))
        if not answer and self.job.rank != 0:
            _say("rank 0 does not answer, which may have ended first")

    def _end(self, reason: str, told: bool = False) -> None:
        """Ends this process, and lets the other ranks know, unless they have told it to."""
        file = self._write_record(reason)
        _say(f"{reason}. The job ends; this rank's record is in {file}")
        if not told:
            self._exchange({"end": {"rank": self.job.rank, "reason": reason}})
            time.sleep(2 * PERIOD)  # the others write their records
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
            _say(f"rank {self.job.rank} cannot write its record: {error}")
        return file

    def _sentence(self, waiting: Waiting, missing: list[dict[str, Any]]) -> str:
        """Says in which collective this rank waits, and what the others are at."""
        seconds = time.time() - waiting.since
        where = f"{waiting.name} (call {waiting.call})"
        own = f"rank {self.job.rank} has waited {seconds:.0f} s in {where}"
        if not missing:
            return f"{own}, in which all ranks are"
        return f"{own}; " + "; ".join(_description(one, waiting.name) for one in missing)


def to_array(message: bytes | None) -> np.ndarray:
    """Returns a message as engines send it: of one length, zeros where there is none."""
    array = np.zeros(4096, np.uint8)
    if message is not None:
        array[: len(message)] = np.frombuffer(message, np.uint8)
    return array


def to_bytes(array: np.ndarray) -> bytes:
    """Returns the message that `to_array` has made an array of."""
    return array.tobytes().rstrip(b"\0")


def _is_in(one: dict[str, Any], waiting: Waiting) -> bool:
    """Says whether a rank waits in the same collective."""
    name, call, *_ = one.get("waiting") or (None, None)
    return one["status"] == "running" and (name, call) == (waiting.name, waiting.call)


def _description(one: dict[str, Any], name: str | None = None) -> str:
    """Says what a rank is at, and how often it has done the operation ``name``."""
    who = f"rank {one['rank']}"
    if "host" in one:
        who += f" (process {one['pid']} on {one['host']})"
    status = one["status"]
    if status == "lost":
        return f"{who} is gone without a word"
    if status == "silent":
        ago = f" for {one['silent']:.0f} s" if "silent" in one else ""
        return f"{who} has not answered{ago}{_last(one)}"
    if status != "running":
        return f"{who} {status}{_last(one)}"
    if one.get("waiting"):
        name, call, _ = one["waiting"]
        return f"{who} is in {name} (call {call})"
    done = one.get("done", {}).get(name)
    times = "" if done is None else f", and has done this one {done} times"
    return f"{who} is in no collective{times}{_last(one)}"


def _last(one: dict[str, Any]) -> str:
    last = one.get("last")
    if not last or last["left"] is None:
        return ""
    ago = one["now"] - last["left"]
    return f"; it left its last one, {last['name']} (call {last['number']}), {ago:.0f} s before"


def _stack(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    return "".join(traceback.format_stack(frame)[-_FRAMES:]) if frame else ""


def _say(text: str) -> None:
    # In one piece: launchers weave the lines of several ranks.
    sys.stderr.write(f"syncbn: {text}\n")
    sys.stderr.flush()


_watchdog: Watchdog | None = None


def watch_job(job: WatchedJob) -> None:
    """Watches this process from now on, where its job has several; once."""
    global _watchdog
    if _watchdog is None and job.size > 1 and is_on():
        _watchdog = Watchdog(job)
        _watchdog.start()
        atexit.register(_watchdog.stop)


def described(several: bool) -> str:
    """Says in words whether this process is watched; ``several``: whether its job has others."""
    if not several:
        return "not needed, since one process has all replicas"
    if _watchdog is None:
        return "off" + ("" if is_on() else " (SYNCBN_WATCHDOG=0)")
    warn, end = _watchdog.limits
    told = "never" if warn == float("inf") else f"after {warn:g} s"
    ended = "never" if end == float("inf") else f"after {end:g} s"
    return f"on; a rank that waits says so {told}, and ends the job {ended}"


def current() -> Watchdog | None:
    """Returns what watches this process, if anything does."""
    return _watchdog
