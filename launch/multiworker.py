#!/usr/bin/env python3
"""Start the workers of a MultiWorkerMirroredStrategy, each with its TF_CONFIG.

All of them, on this machine:

    syncbn launch multiworker --workers 2 -- python train.py

or one of those on several machines, with the same line on each except for the index:

    syncbn launch multiworker --host one:12345,two:12345 --index 0 -- python train.py

In a checkout also launch/multiworker.py instead of `syncbn launch multiworker`.

When a worker fails, the others get a few seconds to fail by themselves and to say why; then all are
ended, with what they have started, and the exit code is that of the first: 128 + n where signal n
ended it. SIGTERM, SIGUSR1 and SIGUSR2 to this script are passed on to the workers: to those of
their processes that catch the signal, so that a shell around the training lives on, or to all where
none does. After SIGTERM they have two minutes to end by themselves, and so to save; after another
one, SIGINT or SIGHUP they are ended at once.

Each line of output is prefixed with the worker's index (rank_lines.py). All of it is passed on,
however slowly it is read, unless a signal to end comes once the workers have ended. Where it cannot
be passed on, the workers are ended, and the exit code is 1.

The ports of --workers were free a moment before. Should another process take one in that moment,
the worker fails, and with it the job: start it again. Workers on a machine with GPUs see
all of them; start one worker there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

from process_groups import end, ended, free_addresses, settle
from rank_lines import NO_TAG, Copier, Target
from rank_signals import SAVE, children, signal_family

SAY, SETTLE, TERMINATE = 1.0, 5.0, 5.0
"""Seconds for somebody to take a message, and for workers to fail, and to end when told to."""
ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def multiworker_arguments() -> argparse.Namespace:
    """Parses the command line; exits with 2 where it is wrong."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        usage="syncbn launch multiworker (--workers N | --host HOSTS --index I) [--xla] "
        "[--timeout SECONDS] -- COMMAND...",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workers", type=int, metavar="N", help="start N workers on this machine")
    what.add_argument(
        "--host", metavar="HOSTS", help="all workers of the cluster: host1:port1,host2:port2"
    )
    parser.add_argument(
        "--index",
        type=int,
        metavar="I",
        help="which of them to start here (default: $SLURM_PROCID)",
    )
    parser.add_argument(
        "--xla",
        action="store_true",
        help="let XLA compile what lies between collectives: puts its flags before yours in "
        "TF_XLA_FLAGS",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long a worker may wait for the others in a synchronized layer before the job "
        "ends: sets SYNCBN_TIMEOUT_SECONDS; 0 for ever (default: 600)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each worker runs")
    given = parser.parse_args()
    if given.command[:1] == ["--"]:
        del given.command[0]
    if not given.command:
        parser.error("a command is required, such as: -- python train.py")
    if not shutil.which(given.command[0]):
        parser.error(f"no such command: {given.command[0]}")
    if given.workers is not None and given.workers < 1:
        parser.error(f"--workers must be a positive number. Received: {given.workers}")
    if given.workers is not None and given.index is not None:
        parser.error("--index belongs to --host")
    if given.host is not None:
        given.host = given.host.split(",")
        if given.index is None:
            slurm = os.environ.get("SLURM_PROCID", "")
            if not slurm.isdigit():
                parser.error("--host needs --index, the number of the worker to start here")
            given.index = int(slurm)
        for host in given.host:
            name, _, port = host.rpartition(":")
            if not name or not port.isdigit() or not 0 < int(port) < 65536:
                parser.error(f"--host takes host:port,host:port,... Received: {host!r}")
        if len(set(given.host)) < len(given.host):
            parser.error(f"--host names a worker twice. Received: {','.join(given.host)}")
        if not 0 <= given.index < len(given.host):
            parser.error(
                f"--index must be between 0 and {len(given.host) - 1}, as --host names "
                f"{len(given.host)} workers. Received: {given.index}"
            )
    return given


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds, or 0 for no limit. Received: {text!r}"
        )
    return seconds


def check_inherited(cluster: list[str] | None) -> None:
    """Refuses a TF_CONFIG that the workers' own would silently replace.

    Args:
        cluster: The workers' addresses; None where their ports are still to be chosen.
    """
    inherited = os.environ.get("TF_CONFIG")
    if inherited is None:
        return
    try:
        config = json.loads(inherited)
        theirs = config.get("cluster", {})
    except (ValueError, AttributeError):
        sys.exit(
            "multiworker.py: TF_CONFIG must be a JSON object. "
            f"Received: {inherited!r}. Unset it: this script makes its own"
        )
    if theirs and theirs != {"worker": cluster}:
        sys.exit(
            "multiworker.py: TF_CONFIG already describes a cluster, other than the one to start. "
            f"Received: {inherited}. Unset it, or start the command without this script"
        )


def check_free(address: str) -> None:
    """Exits with a message where the port of ``address`` is in use on this machine."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TensorFlow's server does
        try:
            one.bind(("", port))
        except OSError as error:
            sys.exit(
                f"multiworker.py: port {port} of {address} must be free on this machine. "
                f"Received: {error.strerror}. End what uses it, or give another one"
            )


def start_worker(command: list[str], cluster: list[str], index: int) -> subprocess.Popen[bytes]:
    """Starts a worker in a process group of its own, to be killed when this process is."""
    config = {"cluster": {"worker": cluster}, "task": {"type": "worker", "index": index}}
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1
    return subprocess.Popen(  # noqa: S603  the user's own command, and no shell
        command,
        # Unbuffered, or the last words of a worker that is killed would be lost.
        env={"PYTHONUNBUFFERED": "1", **os.environ, "TF_CONFIG": json.dumps(config)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: prctl(set_parent_death_signal, signal.SIGKILL),
    )


def wait(
    workers: dict[int, subprocess.Popen[bytes]],
    received: list[int],
    lost: list[str],
    say: Callable[[str], None],
) -> int:
    """Waits until all have succeeded, one has failed, or something else ends the job.

    Args:
        workers: The workers, by index.
        received: Where the handler puts signals.
        lost: Why output could not be passed on, where it could not.
        say: Prints a message.

    Returns:
        The exit code of the job.
    """
    deadline = float("inf")
    while time.monotonic() < deadline:
        # Before the signals: a scheduler may send another one while a worker that has saved exits.
        ends = {index: ended(worker) for index, worker in workers.items()}
        # Before the end of workers, which have nowhere to write now.
        if lost:
            return 1
        if signal.SIGPIPE in received:
            return 128 + signal.SIGPIPE
        for index, it in ends.items():
            if it and it[0]:
                others = "; ending the others" if None in ends.values() else ""
                say(f"worker {index} {it[1]}{others}")
                settle(list(workers.values()), SETTLE, lambda: bool(received))
                return it[0]
        if None not in ends.values():
            return 0
        for number in received[:]:
            if number == signal.SIGTERM and deadline < float("inf"):
                return 128 + number  # it stays: nor does output wait then
            received.remove(number)
            if number not in PASSED_ON:
                return 128 + number
            family = children()
            for worker in workers.values():
                signal_family(worker.pid, family, number)
            if number == signal.SIGTERM:
                deadline = time.monotonic() + SAVE
        time.sleep(0.05)
    return 128 + signal.SIGTERM


def finish(copiers: list[Copier], messages: list[threading.Thread], received: list[int]) -> None:
    """Waits until all output of workers that have ended is passed on, or for a signal to end."""
    for copier in copiers:
        copier.ended.set()
    for thread in [*copiers, *messages]:
        while thread.is_alive() and not any(number in ENDING for number in received):
            thread.join(0.05)


def main() -> int:
    """Starts the workers, and returns the exit code of the job."""
    given = multiworker_arguments()
    check_inherited(given.host)
    if given.xla:
        own = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"
        os.environ["TF_XLA_FLAGS"] = f"{own} {os.environ.get('TF_XLA_FLAGS', '')}"
    if given.timeout is not None:
        # In decimal notation, with all digits.
        os.environ["SYNCBN_TIMEOUT_SECONDS"] = f"{Decimal(str(given.timeout)):f}"
    received: list[int] = []
    for number in (signal.SIGPIPE, *ENDING, *PASSED_ON):
        signal.signal(number, lambda number, _: received.append(number))
    output = Target()
    errors = output if os.path.sameopenfile(1, 2) else Target()

    messages: list[threading.Thread] = []

    def say(message: str) -> None:
        def write() -> None:
            with contextlib.suppress(OSError):  # nobody hears it
                errors.write(2, b"", f"multiworker.py: {message}\n".encode(), False)

        # Where nobody takes what the workers print, neither does anybody this; the job goes on.
        messages.append(threading.Thread(target=write, daemon=True))
        messages[-1].start()
        messages[-1].join(SAY)

    lost: list[str] = []

    def fail(reason: str) -> None:
        lost.append(reason)
        if lost[0] is reason:  # also where two threads come at once, one of them
            say(f"output could not be passed on: {reason}")

    workers: dict[int, subprocess.Popen[bytes]] = {}
    copiers: list[Copier] = []
    try:
        if given.host:
            check_free(given.host[given.index])
            cluster, indices = given.host, [given.index]
        else:
            cluster = free_addresses(given.workers)
            indices = list(range(given.workers))
        for index in indices:
            workers[index] = start_worker(given.command, cluster, index)
        for index, worker in workers.items():
            rank = b"%d" % index
            copiers += [
                Copier(worker.stdout, output, 1, NO_TAG, fail, rank),
                Copier(worker.stderr, errors, 2, NO_TAG, fail, rank),
            ]
        for copier in copiers:
            copier.start()
        code = wait(workers, received, lost, say)
    finally:
        end(list(workers.values()), TERMINATE)
        finish(copiers, messages, received)
    return 1 if lost else code


if __name__ == "__main__":
    sys.exit(main())
