"""What each rank says of itself, kept on the host of rank 0.

Messages are JSON, each with an HMAC (RFC 2104) under a key that the ranks get from rank 0 through
their engine. A connection begins with a nonce from each side, and both count their messages, so
that nothing can be said twice, or by anybody else. Nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any

from syncbn._src.watchdog.messages import ENDED

KEY_LENGTH, _NONCE_LENGTH, _MAC_LENGTH = 32, 16, 32
_LONGEST = 1 << 20
"""Bytes of a message."""
TIMEOUT = 5.0
"""Seconds that a rank waits for an answer of the store."""


class _Codec:
    """One direction of a connection."""

    def __init__(self, key: bytes, nonce: bytes, direction: bytes):
        self._key, self._context, self._number = key, nonce + direction, 0

    def seal(self, message: dict[str, Any]) -> bytes:
        body = json.dumps(message).encode()
        return struct.pack("!I", len(body)) + self._mac(body) + body

    def open(self, mac: bytes, body: bytes) -> dict[str, Any]:
        if not hmac.compare_digest(mac, self._mac(body)):
            raise ConnectionError("a message of somebody else")
        return json.loads(body)

    def _mac(self, body: bytes) -> bytes:
        self._number += 1
        counted = self._context + struct.pack("!Q", self._number) + body
        return hmac.digest(self._key, counted, hashlib.sha256)


def _length(header: bytes) -> int:
    (length,) = struct.unpack("!I", header)
    if length > _LONGEST:
        raise ConnectionError("a message that is too long")
    return length


_TOLD = 8
"""Of how many ranks an answer says what they are at."""


class Store:
    """What the ranks have said last. It answers each message with what the sender asks for.

    Args:
        key: What the ranks know, and nobody else.
        size: How many ranks there are.
        loopback: Whether all of them are on this machine.
    """

    def __init__(self, key: bytes, size: int, loopback: bool):
        self._key, self._size = key, size
        self._states: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._connections: dict[int, asyncio.StreamWriter] = {}
        self._asked: tuple[float, str | None] = (float("-inf"), None)
        self._end: dict[str, Any] | None = None
        self._leaving: dict[int, str] = {}
        listening = socket.create_server(("127.0.0.1" if loopback else "", 0))
        self.port: int = listening.getsockname()[1]
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()
        name = "syncbn-store"
        threading.Thread(target=self._run, args=(listening,), name=name, daemon=True).start()

    def close(self) -> None:
        """Ends the store: who asks it gets no answer any more."""
        self._loop.call_soon_threadsafe(self._closed.set)

    def _run(self, listening: socket.socket) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._answer_until_closed(listening))

    async def _answer_until_closed(self, listening: socket.socket) -> None:
        server = await asyncio.start_server(self._serve, sock=listening)
        await self._closed.wait()
        server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    def wait_until_heard(self, seconds: float) -> None:
        """Waits until the others that have not ended have had an answer, or the time is over.

        Also those that have failed and are still there: they ask once more, for who is gone.
        """
        begin = time.monotonic()
        while time.monotonic() < begin + seconds and any(
            self._heard[rank] < begin and (one["status"] == "running" or rank in self._connections)
            for rank, one in list(self._states.items())
            if rank != 0 and one["status"] != ENDED
        ):
            time.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce, rank = os.urandom(_NONCE_LENGTH), -1
        try:
            writer.write(nonce)
            nonce += await reader.readexactly(_NONCE_LENGTH)
            incoming, outgoing = (_Codec(self._key, nonce, way) for way in (b"to", b"from"))
            while True:
                length = _length(await reader.readexactly(4))
                mac = await reader.readexactly(_MAC_LENGTH)
                state = incoming.open(mac, await reader.readexactly(length))
                rank = state["rank"]
                self._connections[rank] = writer
                writer.write(outgoing.seal(self._answer(rank, state)))
                await writer.drain()
        except (OSError, EOFError, ValueError, KeyError, asyncio.CancelledError):
            pass  # gone, somebody else, or the store is closed
        finally:
            writer.close()
            # A rank that comes back has another connection.
            if self._connections.get(rank) is writer:
                del self._connections[rank]

    def _answer(self, rank: int, state: dict[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        # What is told only when somebody asks is kept.
        self._states[rank] = {**self._states.get(rank, {}), **state}
        self._heard[rank] = now
        if state["asks"] and state["waiting"]:
            self._asked = now, state["waiting"][0]
        self._end = self._end or state.get("end")
        if state.get("overdue"):
            self._have_leave(state)
        gone = [one for one in self._states.values() if one["status"] != "running"]
        since, name = self._asked
        answer: dict[str, Any] = {
            "asked": name if now - since < TIMEOUT else None,
            "end": self._end,
            "leave": self._leaving.get(rank),
            "gone": [one for one in gone if one["rank"] != rank][:_TOLD],
        }
        if state["asks"]:
            answer["missing"] = self._missing(rank, state)
        return answer

    def _have_leave(self, state: dict[str, Any]) -> None:
        """Decides who has to leave the job, because a rank has waited for them too long.

        Those that answer, and are in no collective. One that is in another, or in this one by now,
        waits itself; one that does not answer cannot be told.
        """
        for rank in self._members(state):
            one = self._known(rank)
            if one["status"] == "running" and one["waiting"] is None:
                self._leaving.setdefault(rank, state["overdue"])

    def _members(self, state: dict[str, Any]) -> Iterable[int]:
        return range(self._size) if state["members"] is None else state["members"]

    def _missing(self, rank: int, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns what those are at that are not in the call in which a rank waits."""
        found = [
            one
            for one in map(self._known, self._members(state))
            if one["rank"] != rank
            and not (one["status"] == "running" and one["waiting"] == state["waiting"])
        ]
        more = len(found) - _TOLD
        return found[:_TOLD] + ([{"rank": None, "more": more}] if more > 0 else [])

    def _known(self, rank: int) -> dict[str, Any]:
        if rank not in self._states:
            return {"rank": rank, "status": "silent"}
        one, silent = self._states[rank], time.monotonic() - self._heard[rank]
        if one["status"] != "running" or silent < TIMEOUT:
            return one
        # Without a connection for so long, a process is no longer there.
        lost = rank not in self._connections and silent > 2 * TIMEOUT
        return {**one, "status": "lost" if lost else "silent", "silent": silent}


class StoreClient:
    """A rank's connection to the store.

    Args:
        addresses: Where the store may be reached, the likeliest first.
        port: Its port.
        key: The key of the job.

    Raises:
        OSError: at none of them.
    """

    def __init__(self, addresses: list[str], port: int, key: bytes):
        self._socket = _connected(addresses, port)
        try:
            nonce = os.urandom(_NONCE_LENGTH)
            self._socket.sendall(nonce)
            nonce = self._read(_NONCE_LENGTH) + nonce
        except OSError:
            self.close()
            raise
        self._outgoing, self._incoming = (_Codec(key, nonce, way) for way in (b"to", b"from"))
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def say(self, state: dict[str, Any]) -> dict[str, Any]:
        """Says what this rank is at, and returns the answer.

        Raises:
            OSError: the store is gone, or (TimeoutError) does not answer.
        """
        with self._lock:
            self._socket.sendall(self._outgoing.seal(state))
            length = _length(self._read(4))
            mac = self._read(_MAC_LENGTH)
            return self._incoming.open(mac, self._read(length))

    def _read(self, length: int) -> bytes:
        parts = b""
        while len(parts) < length:
            part = self._socket.recv(length - len(parts))
            if not part:
                raise ConnectionError("the store is gone")
            parts += part
        return parts


def _connected(addresses: list[str], port: int) -> socket.socket:
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), TIMEOUT)
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), TIMEOUT)


def own_addresses() -> list[str]:
    """Returns addresses under which other machines may reach this one."""
    found = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; TEST-NET-1 of RFC 5737
            found.insert(0, probe.getsockname()[0])
        except OSError:
            pass  # no route
    return found
