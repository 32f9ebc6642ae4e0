"""The notice that a job has to end soon: a signal to any of its processes, which all agree on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

import numpy as np

from syncbn._src.communicators.base import Communicator
from syncbn._src.communicators.host_collectives import all_gather

PERIOD = 1.0
"""Seconds from one question to the next: what a notice may take to be heard, and no more than a
thousandth of which a small collective takes."""
_GROWTH = 2
"""How many times as many steps as before there may be between two questions: a step that was slow,
as the first is, says little of the next ones."""

_listening: list[PreemptionNotice] = []


class PreemptionNotice:
    """Listens for signals, and tells all workers at the same step that one of them has got one.

    Args:
        numbers: The signals.

    Raises:
        ValueError: one of them is no signal, or cannot be caught.
    """

    def __init__(self, numbers: Iterable[int]):
        try:
            self._numbers = [signal.Signals(number) for number in numbers]
        except ValueError as error:
            raise ValueError(
                f"`signals` must be of the module signal. Received: {error}."
            ) from error
        fatal = {signal.SIGKILL, signal.SIGSTOP} & {*self._numbers}
        if fatal:
            raise ValueError(
                f"`signals` must be ones that a process can catch. Received: {fatal.pop().name}."
            )
        self._received = 0
        self._told = False
        """Whether a signal has been heard: the end is near, and no other one is to cut it short."""
        self._within: tuple[int, CodeType] | None = None
        self._before: dict[int, Any] = {}
        self._steps, self._steps_between, self._asked = 0, 1, 0.0

    def listen(self, within: FrameType | None = None) -> None:
        """Catches the signals from now on, in place of what did before.

        Forked processes do not: what ends them is no notice for the job.

        Args:
            within: The call that asks. Once it has been left, as by an error, nobody would ask
                whether there was a signal; then the first one goes to what caught it before.

        Raises:
            RuntimeError: the call is not made in the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "Only the main thread of a process can catch signals. Received: training in "
                f"{threading.current_thread().name}. Call it from the main thread."
            )
        for told in [one for one in _listening if one._told]:
            told.stop()  # somebody has caught its exit, and goes on
        self._told = False
        # No reference to the frame, which would keep all of its variables.
        self._within = None if within is None else (id(within), within.f_code)
        self._steps, self._steps_between, self._asked = 0, 1, time.monotonic()
        if self not in _listening:
            _listening.append(self)
        for number in self._numbers:
            before = signal.signal(number, self._receive)
            self._before.setdefault(number, before)

    def stop(self) -> None:
        """Leaves the signals to what caught them before, also one that nobody has heard yet."""
        self._restore_handlers()
        unheard, self._received = 0 if self._told else self._received, 0
        if unheard in self._before:
            self._pass_on(unheard, None)
        elif unheard:
            signal.raise_signal(unheard)

    def _restore_handlers(self) -> None:
        if self in _listening:
            _listening.remove(self)
        for number, before in [*self._before.items()]:
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL if before is None else before)
                del self._before[number]
            # Else somebody has put a handler above this one, which may pass signals on to it.

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Gives a signal to what caught it before."""
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def heard(self, workers: Communicator, ask: bool = False) -> dict[int, str]:
        """Returns the signals that workers have got, by rank. All workers call it after each step.

        They ask one another about once in `PERIOD`, and each time one worker alone would.

        Args:
            workers: The communicator of the workers.
            ask: Whether to ask now, whatever time it is; the same on all workers.
        """
        self._steps += 1
        if workers.size == 1:
            self._told = self._received != 0
            return {0: signal.Signals(self._received).name} if self._told else {}
        if self._steps < self._steps_between and not ask:
            return {}
        seconds = time.monotonic() - self._asked
        rows = all_gather(workers, np.array([self._received, seconds]), "syncbn/preemption")
        # All compute it from the same rows, and so ask again after as many steps.
        of_a_step = max(rows[:, 1].max() / self._steps, 1e-9)
        most = _GROWTH * self._steps_between
        self._steps_between = max(1, min(most, int(PERIOD / of_a_step)))
        self._steps, self._asked = 0, time.monotonic()
        numbers = {rank: int(number) for rank, number in enumerate(rows[:, 0]) if number}
        self._told = bool(numbers)
        return {rank: signal.Signals(number).name for rank, number in numbers.items()}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self not in _listening and number in self._before:
            self._pass_on(number, frame)  # whoever has put a handler above this one passes it on
            return
        self._received = number
        if not self._told and not self._is_within(frame):
            self.stop()

    def _is_within(self, frame: FrameType | None) -> bool:
        """Says whether the call that asks is still running, of which ``frame`` is a part."""
        if self._within is None:
            return True
        while frame is not None and (id(frame), frame.f_code) != self._within:
            frame = frame.f_back
        return frame is not None


def _leave_signals_in_child() -> None:
    for notice in reversed([*_listening]):  # each has what the one before it has set
        notice._restore_handlers()


os.register_at_fork(after_in_child=_leave_signals_in_child)
