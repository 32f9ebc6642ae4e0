"""The collectives of this process: which it has entered, and which it has left."""

from __future__ import annotations

import functools
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn._src.ops.graphs import in_session, traced_outside
from syncbn._src.ops.vectorization import convert_loops_with, same_in_all_iterations

LENGTH = 200
"""How many of the latest collectives are kept."""

_numbers = itertools.count()


class Collective:
    """A collective that Python runs, in a ``with`` statement: left after it, or failed.

    Args:
        number: Of the process's collectives, from 1.
        name: The operation's.
        members: The ranks that take part; ``None`` for all of the job.
        seconds: Where the time that it takes is added up, by name.
    """

    __slots__ = ("_seconds", "entered", "failed", "left", "members", "name", "number")

    def __init__(
        self,
        number: int,
        name: str,
        members: Sequence[int] | None,
        seconds: defaultdict[str, float],
    ):
        self.number, self.name, self.members = number, name, members
        self._seconds = seconds
        self.entered = time.time()
        self.left: float | None = None
        self.failed = False

    def __enter__(self) -> Collective:
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: Any) -> None:
        if raised is not None:
            self.failed = True
            return
        self.left = time.time()
        self._seconds[self.name] += self.left - self.entered


class Site:
    """A collective of a graph, which runs without Python: counters that the graph adds to.

    Args:
        name: The operation's.
        members: As in `Collective`.
    """

    def __init__(self, name: str, members: Sequence[int] | None):
        self.name, self.members = name, members
        counters = [f"syncbn/site/{next(_numbers)}" for _ in range(3)]
        self._entered, self._left, self._clock = counters
        dtypes = tf.int64, tf.int64, tf.float64
        with tf.init_scope(), tf.device("CPU:0"):
            for counter, dtype in zip(counters, dtypes, strict=True):
                zero = tf.zeros([], dtype)
                tf.raw_ops.AssignVariableOp(resource=_handle(counter, dtype), value=zero)
        self.since: float | None = None
        """When it was seen first that it had been entered, and not left."""
        self._before = (0, 0)
        self._seen = (0, 0)
        self._outstanding: deque[int] = deque(maxlen=3)

    def begin_anew(self) -> None:
        """Counts from now on. Nobody is in it."""
        self._before = self._counted()
        self.since, self._seen = None, (0, 0)
        self._outstanding.clear()

    def enter(self) -> tf.Tensor:
        """Counts an entry, in the graph that is being made, and returns its time."""
        with tf.control_dependencies([_add(self._entered, 1, tf.int64)]):
            return _now()

    def leave(self, since: tf.Tensor) -> tf.Operation:
        """Returns the operation that counts a leave, and the time since the entry."""
        with tf.control_dependencies([_add(self._clock, _now() - since, tf.float64)]):
            return _add(self._left, 1, tf.int64)

    def seconds(self) -> float:
        """Returns how long this process has been in it, in the calls that it has left."""
        return _value(self._clock, tf.float64)

    def poll(self) -> tuple[int, int]:
        """Returns how often it was entered and left."""
        counts = entered, left = self._since_beginning()
        if left != self._seen[1]:
            self._outstanding.append(entered - left)
        # What stays entered while it goes on is of steps that have failed.
        several = len(self._outstanding) == self._outstanding.maxlen
        if entered - left <= (min(self._outstanding) if several else 0):
            self.since = None
        elif counts != self._seen or self.since is None:
            self.since = time.time()
        self._seen = counts
        return counts

    def _since_beginning(self) -> tuple[int, int]:
        (entered, left), (entered_before, left_before) = self._counted(), self._before
        return entered - entered_before, left - left_before

    def _counted(self) -> tuple[int, int]:
        # In this order: what is left was entered before.
        left, entered = _value(self._left), _value(self._entered)
        return entered, left


def _handle(counter: str, dtype: tf.DType = tf.int64) -> tf.Tensor:
    # By its name, so that no graph captures it: the gradient of a branch takes nothing else in. It
    # waits for nothing, or all that TensorFlow keeps in program order after it would wait too.
    with tf.control_dependencies(None):
        return tf.raw_ops.VarHandleOp(dtype=dtype, shape=[], shared_name=counter)


def _value(counter: str, dtype: tf.DType = tf.int64) -> Any:
    with tf.device("CPU:0"):
        value = tf.raw_ops.ReadVariableOp(resource=_handle(counter, dtype), dtype=dtype)
    return value.numpy().item()


def _add(counter: str, value: Any, dtype: tf.DType) -> tf.Operation:
    with tf.device("CPU:0"):
        operation = tf.raw_ops.AssignAddVariableOp(
            resource=_handle(counter, dtype), value=tf.convert_to_tensor(value, dtype)
        )
    # A vectorized loop makes one collective of all iterations.
    convert_loops_with(operation, lambda loop: _add(counter, loop.unstacked_input(1), dtype))
    return operation


def _now() -> tf.Tensor:
    # TensorFlow keeps timestamps in program order, so each collective of a graph would wait for all
    # before it. Calls that are said to have no state are not kept in order.
    with tf.device("CPU:0"):
        (now,) = tf.raw_ops.PartitionedCall(args=[], Tout=[tf.float64], f=_timestamp())
    convert_loops_with(now.op, lambda loop: [same_in_all_iterations(_now())])
    return now


@functools.cache
def _timestamp() -> Any:
    return traced_outside(tf.timestamp)


class Waiting(NamedTuple):
    """A collective that was entered, and not left."""

    name: str
    call: int
    """The number of the collective, or how often its operation has run: its step."""
    since: float
    members: Sequence[int] | None


class FlightRecorder:
    """The latest collectives of this process."""

    def __init__(self) -> None:
        self._latest: deque[Collective] = deque(maxlen=LENGTH)
        self._sites: list[Site] = []
        self._count = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def begin_anew(self) -> None:
        """Forgets all but the times that were added up: numbers are those of another job.

        What was entered and not left has failed, and is waited for no longer.
        """
        self._latest.clear()
        self._count = 0
        for site in self._sites:
            site.begin_anew()

    def enter(self, name: str, members: Sequence[int] | None) -> Collective:
        """Makes a record of a collective that Python is about to run."""
        self._count += 1
        record = Collective(self._count, name, members, self._seconds)
        self._latest.append(record)
        return record

    def watch(
        self,
        name: str,
        members: Sequence[int] | None,
        tensors: Any,
        collective: Callable[[Any], Any],
    ) -> Any:
        """Returns ``collective(tensors)``, and keeps a record of it, eagerly and in graphs."""
        if tf.executing_eagerly():
            with self.enter(name, members):
                return collective(tensors)
        if in_session():  # nor is a session's watched
            return collective(tensors)
        site = Site(name, members)
        self._sites.append(site)
        # Automatic clustering would count when a cluster begins, and not when it comes here.
        with tf.xla.experimental.jit_scope(compile_ops=False):
            with tf.control_dependencies(tf.nest.flatten(tensors)):
                entered = site.enter()
            with tf.control_dependencies([entered]):
                totals = collective(tensors)
            with tf.control_dependencies(tf.nest.flatten(totals)):
                left = site.leave(entered)
            with tf.control_dependencies([left]):
                return tf.nest.map_structure(tf.identity, totals)

    def waiting(self) -> Waiting | None:
        """Returns the collective that this process has waited in longest."""
        found = []
        for one in list(self._latest):
            if one.left is None and not one.failed:
                found.append(Waiting(one.name, one.number, one.entered, one.members))
        for site in list(self._sites):
            entered, _ = site.poll()
            if site.since is not None:
                found.append(Waiting(site.name, entered, site.since, site.members))
        return min(found, key=lambda one: one.since, default=None)

    def counts(self) -> dict[str, int]:
        """Returns how often each operation of a graph has been done."""
        return {site.name: site.poll()[1] for site in list(self._sites)}

    def seconds(self) -> dict[str, float]:
        """Returns how long this process has been in collectives, all added up, by their names.

        On a GPU, those of a graph count from when they were issued.
        """
        seconds = defaultdict(float, self._seconds)
        for site in list(self._sites):
            seconds[site.name] += site.seconds()
        return dict(seconds)

    def last(self) -> dict[str, object] | None:
        """Returns the collective that Python has run last, if any."""
        return _fields(self._latest[-1]) if self._latest else None

    def as_json(self) -> dict[str, object]:
        """Returns all that is known."""
        sites = [(site.name, *site.poll()) for site in list(self._sites)]
        return {
            "collectives": [_fields(one) for one in list(self._latest)],
            "sites": [{"name": name, "entered": n, "left": m} for name, n, m in sites],
        }


def _fields(record: Collective) -> dict[str, object]:
    return {
        "number": record.number,
        "name": record.name,
        "entered": record.entered,
        "left": record.left,
    }


RECORDER = FlightRecorder()
"""That of this process."""
