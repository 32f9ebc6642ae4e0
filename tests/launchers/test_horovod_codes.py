"""`horovod.sh` over Gloo: the code of the rank that failed first, and time to save at SIGTERM."""

import ast
import os
import re
import shlex
import signal
import sys
import uuid

import pytest

from tests import processes
from tests.launch_scripts import LAUNCH

WORDS = "The first process to do so was:\nProcess name: {name}\nExit code: {code}\n"
"""What horovodrun says of the rank that failed first."""
RANKS = """
import os, pathlib, signal, sys, time

rank, folder = int(os.environ["HOROVOD_RANK"]), pathlib.Path(sys.argv[1])
told = []


def signal_launcher(number):
    while len([*folder.iterdir()]) < 2:
        time.sleep(0.05)
    os.kill(int(os.environ["LAUNCHER"]), number)


def tell(text):
    sys.stdout.write(f"{text}\\n")  # in one piece, as Horovod marks each
    sys.stdout.flush()
"""
"""What comes before the code of each rank."""
NOTE_SIGTERM = "signal.signal(signal.SIGTERM, lambda *_: told.append('once'))\n"
READY = "(folder / str(rank)).touch()\n"


def launcher(code, folder, *options):
    """The command that runs ``code`` in two ranks, which know the launcher's process number."""
    start = [str(LAUNCH / "horovod.sh"), "-np", "2", *options, "--"]
    line = shlex.join([*start, sys.executable, "-c", RANKS + code, str(folder)])
    return ["bash", "-c", f"export LAUNCHER=$$; exec {line}"]


def run(code, folder, *options):
    return processes.run([("horovod.sh", launcher(code, folder, *options), {})])


def test_the_code_is_that_of_the_rank_that_failed_first(tmp_path):
    # The other one is ended by horovodrun, has another code then, and may say what it likes.
    words = WORDS.format(name=0, code=9)
    code = f"tell('ready') if rank else sys.stderr.write({words!r})\n{READY}" + (
        "while not (folder / '0').exists(): time.sleep(0.05)\n"
        "sys.exit(3) if rank else time.sleep(600)"
    )
    finished = run(code, tmp_path)
    assert finished.code == 3, finished.output
    assert "[0]<stderr>:Exit code: 9\n" in finished.output, finished.output
    assert "[1]<stdout>:ready\n" in finished.output, finished.output


def test_a_rank_that_is_killed_has_128_and_the_signal(tmp_path):
    finished = run("time.sleep(600) if rank else os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert finished.code == 128 + signal.SIGKILL, finished.output


def test_ranks_have_more_than_five_seconds_to_save_after_sigterm(tmp_path):
    code = (
        f"{NOTE_SIGTERM}{READY}"
        "if rank == 0: signal_launcher(signal.SIGTERM)\n"
        "while not told: time.sleep(0.05)\n"
        # Horovod would have killed the first; and the second ends well, which ends nobody.
        "time.sleep(1 if rank else 8)\n"
        "tell(f'saved {rank}, told {told}')\n"
        f"sys.exit(0 if rank else {os.EX_TEMPFAIL})"
    )
    finished = run(code, tmp_path)
    assert finished.code == os.EX_TEMPFAIL, finished.output
    for rank in range(2):
        said = f"[{rank}]<stdout>:saved {rank}, told ['once']\n"
        assert said in finished.output, finished.output


def test_the_first_rank_that_exits_leaves_five_seconds_to_the_others(tmp_path):
    code = (
        f"{NOTE_SIGTERM}{READY}"
        "if rank == 0: signal_launcher(signal.SIGTERM)\n"
        "while not told: time.sleep(0.05)\n"
        "time.sleep(1 if rank else 600)\n"
        "tell(f'saved {rank}')\n"
        f"sys.exit({os.EX_TEMPFAIL})"
    )
    finished = run(code, tmp_path)
    assert finished.code == os.EX_TEMPFAIL, finished.output
    assert "saved 1\n" in finished.output, finished.output
    assert "saved 0\n" not in finished.output, finished.output


def test_an_elastic_job_ends_at_sigterm_where_a_rank_does(tmp_path):
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    code = (
        f"{NOTE_SIGTERM}{READY}"
        "if rank == 0: signal_launcher(signal.SIGTERM)\n"
        "while not told: time.sleep(0.05)\n"
        f"sys.exit({os.EX_TEMPFAIL}) if rank else time.sleep(600)"
    )
    hosts = tmp_path / "hosts.sh"  # without a third one in the place of the first that is lost
    hosts.write_text("#!/bin/sh\nprintf 'localhost:1\\n127.0.0.1:1\\n'\n")
    hosts.chmod(0o755)
    options = ["--min-np", "2", "--host-discovery", str(hosts), "--network-interface", "lo"]
    finished = run(code, folder, *options)
    assert finished.code == os.EX_TEMPFAIL, finished.output
    assert not processes.left(str(folder))


def test_ctrl_c_ends_all_ranks(tmp_path):
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    finished = run(f"{READY}signal_launcher(signal.SIGINT) if rank else 0\ntime.sleep(600)", folder)
    assert finished.code == 128 + signal.SIGTERM, finished.output  # which horovodrun has sent them
    assert not processes.left(str(folder))


def first_failure(script, redirect=""):
    """Runs a script of Bash in place of horovodrun."""
    line = shlex.join([sys.executable, str(LAUNCH / "first_failure.py"), "bash", "-c", script])
    return processes.run([("", ["bash", "-c", f"export LAUNCHER=$$; exec {line} {redirect}"], {})])


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 2", 2),
        ("kill -9 $$", -9),
        # A worker of an elastic job that was lost before.
        (f"printf {shlex.quote(WORDS.format(name='here[0]', code=5))} >&2; exit 0", 0),
        (f"printf {shlex.quote(WORDS.format(name='here[0]', code=5))} >&2; exit 1", 5),
        # What has started the rank was killed, and Python says so by a negative number.
        (f"printf {shlex.quote(WORDS.format(name=1, code=-9))} >&2; exit 1", 137),
        # In two pieces, and something after it.
        ("printf 'The first process to do so was:\\nProcess na' >&2; sleep 0.5; "
         "printf 'me: 1\\nExit code: 75\\n' >&2; sleep 0.5; echo leaked >&2; exit 1", 75),
        # Of a rank, whose lines have marks.
        ("printf '[1]<stderr>:The first process to do so was:\\n[1]<stderr>:Process name: 0\\n"
         "[1]<stderr>:Exit code: 5\\n' >&2; exit 1", 1),
        # On stdout, which horovodrun does not say it on.
        (f"printf {shlex.quote(WORDS.format(name=1, code=5))}; exit 1", 1),
    ],
)  # fmt: skip
def test_what_horovodrun_says_and_returns_make_the_code(script, code):
    finished = first_failure(script)
    assert finished.code == code, finished.output


def test_errors_that_somebody_keeps_open_are_not_waited_for():
    words = shlex.quote(WORDS.format(name=1, code=5))
    finished = first_failure(
        f'setsid sleep 600 & echo "kept by $!" >&2; printf {words} >&2; exit 1'
    )
    kept = re.search(r"^kept by (\d+)$", finished.output, re.MULTILINE)
    assert kept, finished.output
    os.kill(int(kept[1]), signal.SIGKILL)  # it is still there
    assert finished.code == 5, finished.output


@pytest.mark.parametrize("redirect", [">/dev/full", "2>/dev/full", "> >(:)"])
def test_output_that_cannot_be_passed_on_ends_the_job(redirect):
    end = "trap 'echo told; exit' TERM; while :; do echo said; echo said >&2; sleep 0.1; done"
    finished = first_failure(end, redirect)
    assert finished.code == 1, finished.output
    if redirect[0] == ">":
        message = "first_failure.py: output could not be passed on: [Errno"
        assert finished.output.count(message) == 1, finished.output
        assert "write error" not in finished.output, finished.output  # of horovodrun


def test_a_full_disk_behind_the_output_ends_the_ranks(tmp_path):
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    line = shlex.join(launcher("while True: tell('x' * 1000)", folder))
    finished = processes.run([("full", ["bash", "-c", f"exec {line} >/dev/full"], {})])
    assert finished.code == 1, finished.output
    assert "output could not be passed on: [Errno 28]" in finished.output, finished.output
    assert not processes.left(str(folder))


def test_output_that_is_read_late_is_not_lost():
    line = shlex.join([sys.executable, str(LAUNCH / "first_failure.py"), "seq", "-f", "%0100g"])
    script = f"set -o pipefail; {line} 3000 | (sleep 2; wc -l)"
    finished = processes.run([("late", ["bash", "-c", script], {})])
    assert finished.code == 0, finished.output
    assert re.search(r"^3000$", finished.output, re.MULTILINE), finished.output


def test_the_first_sigterm_is_for_ranks_and_the_second_for_horovodrun():
    rank = (
        "import os, signal, sys, time; told = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.append('once'))\n"
        "for n in range(1, 3):\n"
        "    os.kill(int(os.environ['LAUNCHER']), signal.SIGTERM)\n"
        "    while n == 1 and not told: time.sleep(0.05)\n"
        "    time.sleep(1.5)\n"
        "print('rank told', *told, flush=True)"
    )
    script = (
        "trap 'echo horovodrun told; told=1' TERM; "
        f"HOROVOD_RANK=0 setsid {shlex.join([sys.executable, '-c', rank])}; "
        'until [ "${told-}" ]; do sleep 0.1; done; exit 1'
    )
    # The rank has a session of its own, as under horovodrun, and so only what is meant for it.
    finished = first_failure(script)
    assert finished.code == 1, finished.output
    # Bash may say in between that its `sleep` was ended.
    told = r"rank told once\n(.*\n)?horovodrun told\n"
    assert re.search(told, finished.output), finished.output


def test_ended_errors_that_nobody_reads_do_not_keep_the_launcher():
    command = [sys.executable, str(LAUNCH / "first_failure.py"), "bash", "-c"]
    code = (
        "import os, subprocess, sys, time\n"
        "read, write = os.pipe()\n"
        "job = subprocess.Popen(sys.argv[1:], stderr=write)\n"
        "time.sleep(2)\n"
        "for _ in range(10):\n"
        "    if job.poll() is None: job.terminate(); time.sleep(1.5)\n"
        "print('ended', job.poll(), flush=True)"
    )
    words = [*command, "head -c 130000 /dev/zero >&2; exec sleep 600"]
    finished = processes.run([("", [sys.executable, "-c", code, *words], {})])
    assert f"ended {-signal.SIGTERM}\n" in finished.output, finished.output


def test_a_flood_of_errors_after_the_end_is_not_waited_for():
    flood = "setsid timeout 60 yes kept >&2 & sleep 0.2; exit 3"
    finished = first_failure(flood, "2>/dev/null")
    assert finished.code == 3, finished.output


def test_errors_may_go_to_a_file_that_does_not_wait():
    code = (
        "import os, subprocess, sys, time\n"
        "read, write = os.pipe(); os.set_blocking(write, False)\n"
        "job = subprocess.Popen(sys.argv[1:], stderr=write); os.close(write)\n"
        "time.sleep(2); came = 0\n"
        "while True:\n"
        "    data = os.read(read, 4000); came += len(data)\n"
        "    if not data: break\n"
        "print('came', came, job.wait())"
    )
    script = "seq -f %0100g 3000 >&2; exit 4"
    words = [sys.executable, str(LAUNCH / "first_failure.py"), "bash", "-c", script]
    finished = processes.run([("", [sys.executable, "-c", code, *words], {})])
    assert "came 303000 4\n" in finished.output, finished.output


@pytest.mark.parametrize("name", ["first_failure.py", "rank_signals.py"])
def test_what_any_python_runs_has_the_syntax_of_python_3_6(name):
    ast.parse((LAUNCH / name).read_text(), feature_version=(3, 6))
