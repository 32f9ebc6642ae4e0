"""`rank_lines.py`: each line once and whole, with its rank; signals, and the end of the job."""

import ast
import os
import re
import shlex
import signal
import sys
import uuid

import pytest
from rank_lines import NO_TAG, Lines, Target

from tests import patience, processes
from tests.launch_scripts import LAUNCH

TAG = rb"\[1,(\d+)\]<std(?:out|err)>:"


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


def test_mpi_marks_each_whole_line_once():
    # Python writes words by themselves here, as it is unbuffered.
    code = (
        "import sys\n"
        "for number in range(300):\n"
        "    print('line', number, 'of', sys.argv[1] * (number % 60), 'ends')\n"
        "    print('error', number, 'ends', file=sys.stderr)\n"
        "sys.stdout.write('unfinished')"
    )
    command = processes.mpirun(3, sys.executable, "-u", "-c", code, "words")
    # A line that takes a rank longer would not be whole.
    finished = processes.run([("", rank_lines(*command, PATIENCE=patience.limit()), {})])
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


def test_a_stream_without_tags_is_its_ranks():
    found = []
    lines = Lines(NO_TAG, lambda *text: found.append(text), b"7")
    lines.add(b"a\n[1,0]<stdout>:b\n\nc", 0)
    lines.close()
    whole = [b"a\n", b"[1,0]<stdout>:b\n", b"\n", b"c\n"]
    assert found == [(b"7", line, False) for line in whole]


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
def test_a_signal_reaches_the_ranks_under_mpi_once(start, number, tmp_path):
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
    command = f"{LAUNCH}/{start} -np 1 -- {shlex.join([sys.executable, '-c', code, marker])}"
    # It waits for what it reads from, and Bash for both.
    kill = (
        'while read -r line; do echo "$line"; '
        f'[ "$line" != \'[0] ready\' ] || kill -{int(number)} "$(cat launcher)"; done'
    )
    script = (
        f"{{ echo $BASHPID >launcher; exec {command}; }} 2>&1 | {kill}; exit ${{PIPESTATUS[0]}}"
    )
    finished = processes.run([("bash", ["bash", "-c", script], {})], cwd=tmp_path)
    assert finished.output.count("[0] told\n") == 1, finished.output
    if number == signal.SIGUSR1:  # the rank's own affair
        assert "[0] over\n" in finished.output, finished.output
        assert finished.code == 0, finished.output
    else:
        assert finished.code not in (0, 124), finished.output
    assert not processes.left(marker)


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
