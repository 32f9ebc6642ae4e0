"""`multiworker.py`: the workers of a cluster, on one machine or several."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest
from multiworker import wait
from process_groups import free_addresses

from tests import patience, processes
from tests.launch_scripts import ARGUMENTS, LAUNCH, launch


def test_multiworker_gives_every_worker_its_task_and_its_arguments():
    code = "import os, sys; print(os.environ['TF_CONFIG'], flush=True); print(sys.argv[1:])"
    finished = launch("multiworker.py", "--workers", "2", sys.executable, "-c", code, *ARGUMENTS)
    assert finished.code == 0, finished.output
    configs = dict(re.findall(r"^\[(\d)\] (\{.*)$", finished.output, re.MULTILINE))
    configs = {index: json.loads(config) for index, config in configs.items()}
    assert configs["0"]["task"] == {"type": "worker", "index": 0}
    assert configs["1"]["task"] == {"type": "worker", "index": 1}
    assert configs["0"]["cluster"] == configs["1"]["cluster"]
    hosts = configs["0"]["cluster"]["worker"]
    assert len({*hosts}) == 2
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", host) for host in hosts)
    for index in range(2):
        assert f"[{index}] {ARGUMENTS}\n" in finished.output, finished.output


def test_multiworker_starts_where_python_does_not_look_beside_a_script():
    finished = launch("multiworker.py", "--workers", "1", "--", "echo", "hi", PYTHONSAFEPATH="1")
    assert finished.code == 0, finished.output
    assert "[0] hi\n" in finished.output, finished.output


def test_multiworker_starts_one_worker_of_a_bigger_cluster():
    (address,) = free_addresses(1)
    show = ["--", "bash", "-c", 'echo "$TF_CONFIG"']
    workers = ["other:2222", address.replace("127.0.0.1", "here")]
    cluster = {"cluster": {"worker": workers}}
    # A TF_CONFIG that says the same is no conflict.
    finished = launch(
        *("multiworker.py", "--host", ",".join(workers), *show),
        SLURM_PROCID="1",
        TF_CONFIG=json.dumps(cluster),
    )
    assert finished.code == 0, finished.output
    config = {**cluster, "task": {"type": "worker", "index": 1}}
    assert f"[1] {json.dumps(config)}\n" in finished.output, finished.output


def test_multiworker_names_a_port_that_is_in_use():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        host = f"localhost:{one.getsockname()[1]}"
        finished = launch("multiworker.py", "--host", f"{host},b:1", "--index", "0", "--", "true")
    assert finished.code == 1
    message = f"port {host[10:]} of {host} must be free on this machine. Received: Address already"
    assert message in finished.output, finished.output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "TF_CONFIG must be a JSON object. Received: '{'"),
        ("[1]", "TF_CONFIG must be a JSON object. Received: '[1]'"),
        ('{"cluster": {"worker": ["a:1"]}}', "TF_CONFIG already describes a cluster"),
    ],
)
def test_multiworker_refuses_a_tf_config_that_is_broken_or_another_one(config, message):
    finished = launch("multiworker.py", "--workers", "2", "--", "true", TF_CONFIG=config)
    assert finished.code == 1
    assert message in finished.output, finished.output
    assert "Unset it" in finished.output


def test_multiworker_returns_the_code_of_the_first_that_fails_and_hears_the_others(tmp_path):
    command = processes.program("first_worker_that_fails", str(tmp_path))
    finished = launch("multiworker.py", "--workers", "3", "--", *command)
    assert finished.code == 7, finished.output
    assert "worker 1 exited with code 7; ending the others" in finished.output
    assert "[0] worker 1 is gone\n" in finished.output, finished.output
    assert "[2] worker 1 is gone\n" in finished.output, finished.output


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        pytest.param("self", "SIGKILL", 128 + signal.SIGKILL, id="a worker is killed"),
        pytest.param("parent", "SIGTERM", 128 + signal.SIGTERM, id="it is told to end"),
        pytest.param("parent", "SIGINT", 128 + signal.SIGINT, id="it is interrupted"),
    ],
)
def test_multiworker_leaves_nobody_behind_when(target, number, code):
    marker = f"waiting-{uuid.uuid4().hex}"
    command = processes.program("waiting_workers", target, number, marker)
    finished = launch("multiworker.py", "--workers", "2", "--", *command)
    assert "[1] now\n" in finished.output, finished.output
    assert finished.code == code, finished.output
    assert not processes.left(marker)


# After SIGTERM for longer than workers have when another one has failed.
@pytest.mark.parametrize(("name", "code", "tenths"), [("TERM", 75, 60), ("USR1", 0, 1)])
def test_multiworker_passes_signals_on_and_lets_the_workers_end(name, code, tenths):
    pause = "read -rt 0.1 <> <(:)"
    end = f"echo told; for _ in {{1..{tenths}}}; do {pause}; done; exit {code}"
    script = f"trap '{end}' {name}; kill -{name} $PPID; while :; do {pause}; done"
    finished = launch("multiworker.py", "--workers", "1", "--", "bash", "-c", script)
    assert finished.code == code, finished.output
    assert finished.output.count("[0] told\n") == 1, finished.output


def test_a_worker_that_has_saved_counts_more_than_another_signal():
    command = [sys.executable, "-c", f"exit({os.EX_TEMPFAIL})"]
    with subprocess.Popen(command, start_new_session=True) as worker:
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        twice = [signal.SIGTERM, signal.SIGTERM]
        assert wait({0: worker}, twice, [], lambda _: None) == os.EX_TEMPFAIL


def test_the_workers_of_a_multiworker_that_is_killed_end_with_it():
    marker = f"waiting-{uuid.uuid4().hex}"
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    command = [sys.executable, "-c", code, marker]
    finished = launch("multiworker.py", "--workers", "2", "--", *command)
    assert finished.code == -signal.SIGKILL, finished.output
    assert not processes.left(marker)


def test_multiworker_passes_on_what_is_read_late():
    # More than one pipe holds and less than two, so that the worker ends before it is read.
    code = "for number in range(1300): print('line', number, 'x' * 60)"
    worker = shlex.join([sys.executable, "-c", code])
    script = f"{shlex.quote(str(LAUNCH / 'multiworker.py'))} --workers 1 -- {worker}"
    command = ["bash", "-c", f"set -o pipefail; {script} | (sleep 3; wc -l)"]
    finished = processes.run([("late", command, {})])
    assert finished.code == 0, finished.output
    assert re.search(r"^1300$", finished.output, re.MULTILINE), finished.output


def test_a_second_signal_ends_a_multiworker_whose_output_nobody_takes():
    code = (
        "import fcntl, os, subprocess, sys, termios, time\n"
        "read, write = os.pipe()\n"
        "full = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)\n"
        "job = subprocess.Popen(sys.argv[1:], stdout=write)\n"
        "unread = bytes(4)\n"
        "while int.from_bytes(unread, sys.byteorder) < full - 100:\n"
        "    time.sleep(0.05); unread = fcntl.ioctl(read, termios.FIONREAD, unread)\n"
        "job.terminate(); time.sleep(1)\n"
        "print('ended', job.poll(), flush=True)\n"
        "job.terminate()\n"
        "print('ended', job.wait(), flush=True)\n"
    )
    command = [str(LAUNCH / "multiworker.py"), "--workers", "1", "--", "yes"]
    finished = processes.run([("", [sys.executable, "-c", code, *command], {})])
    assert f"ended None\nended {128 + signal.SIGTERM}\n" in finished.output, finished.output


def test_multiworker_ends_though_a_helper_of_a_worker_prints_without_end():
    marker = f"helper-{uuid.uuid4().hex}"
    helper = f"setsid timeout {patience.limit():g} yes {marker} & sleep 1; exit 0"
    script = f"{shlex.quote(str(LAUNCH / 'multiworker.py'))} --workers 1 -- bash -c '{helper}'"
    begin = time.monotonic()
    finished = processes.run([("", ["bash", "-c", f"{script} >/dev/null"], {})])
    assert finished.code == 0, finished.output
    assert time.monotonic() - begin < patience.limit() / 2
    assert not processes.left(marker)  # nobody reads it now


def test_a_worker_that_fails_ends_the_others_though_nobody_takes_the_output():
    fails = 'if [[ "$TF_CONFIG" == *\'"index": 1\'* ]]; then sleep 1; exit 3; fi; exec yes'
    code = (
        "import os, subprocess, sys, time\n"
        "read, write = os.pipe()\n"
        "job = subprocess.Popen(sys.argv[1:], stdout=write, stderr=write)\n"
        "left = ['pgrep', '-P', str(job.pid)]\n"
        "os.read(read, 1)\n"
        "while subprocess.call(left, stdout=subprocess.DEVNULL) == 0: time.sleep(0.1)\n"
        "job.terminate()\n"
        "print('code', job.wait())\n"
    )
    worker = [str(LAUNCH / "multiworker.py"), "--workers", "2", "--", "bash", "-c", fails]
    finished = processes.run([("", [sys.executable, "-c", code, *worker], {})])
    assert finished.output.count("code 3\n") == 1, finished.output


@pytest.mark.parametrize("redirect", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1"])
def test_multiworker_ends_when_its_output_cannot_be_passed_on(redirect):
    marker = f"waiting-{uuid.uuid4().hex}"
    code = "import sys, time; print('said', file=sys.stderr); print('said'); time.sleep(600)"
    worker = shlex.join([sys.executable, "-c", code, marker])
    script = f"{shlex.quote(str(LAUNCH / 'multiworker.py'))} --workers 2 -- {worker} {redirect}"
    finished = processes.run([("full", ["bash", "-c", f"exec {script}"], {})])
    assert finished.code == 1, finished.output
    if redirect == ">/dev/full":
        said = "multiworker.py: output could not be passed on: OSError: [Errno 28]"
        assert finished.output.count(said) == 1, finished.output
    assert not processes.left(marker)


@pytest.mark.parametrize(
    ("given", "exported"), [("1234567", "1234567.0"), ("1e-7", "0.0000001"), ("0", "0.0")]
)
def test_multiworker_exports_a_timeout_without_an_exponent(given, exported):
    show = ["--", "bash", "-c", 'echo "waits $SYNCBN_TIMEOUT_SECONDS"']
    finished = launch("multiworker.py", "--workers", "1", "--timeout", given, *show)
    assert f"[0] waits {exported}\n" in finished.output, finished.output


def test_multiworker_ends_when_nobody_reads_its_output():
    script = f"{shlex.quote(str(LAUNCH / 'multiworker.py'))} --workers 2 -- yes | head -n 1"
    command = ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"]
    finished = processes.run([("bash", command, {})])
    assert finished.code == 128 + signal.SIGPIPE, finished.output
