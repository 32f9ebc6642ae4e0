"""The doctor with real engines."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import patience, processes

SYNCBN = [sys.executable, "-m", "syncbn"]


def found(output):
    """What ``--json`` has printed, after TensorFlow's own words."""
    return json.loads(output[output.index("{") : output.rindex("}") + 1])


def test_every_engine_of_this_machine_works():
    # Each engine takes some seconds.
    command = [*SYNCBN, "doctor", "--json", "--limit", str(patience.limit())]
    start = time.monotonic()
    finished = processes.run([("doctor", command, {})], takes=60)
    took = time.monotonic() - start
    assert finished.code == 0, finished.output
    engines = found(finished.output)["engines"]
    names = ["mirrored", "multiworker", "horovod-gloo", "horovod-mpi", "mpi"]
    assert [one["engine"] for one in engines] == names
    for one in engines:
        assert one["status"] == "ok", one
        assert 0 < one["milliseconds"] < 1e3 * took, one
        if one["engine"].startswith("horovod"):
            assert "with HOROVOD_CYCLE_TIME=1, HOROVOD_CACHE_CAPACITY=1024" in one["advice"], one
            assert "set HOROVOD_CYCLE_TIME=0.1" in one["advice"], one
    machine = found(finished.output)["machine"]
    assert "with gloo, mpi" in machine["Horovod"]
    assert "Open MPI" in machine["mpi4py"]


def test_without_horovod_it_says_how_to_get_it():
    code = (
        "import sys; sys.modules['horovod'] = None\n"
        "from syncbn._src.cli import main\n"
        "sys.exit(main(['doctor', '--engine', 'horovod-gloo']))"
    )
    finished = processes.python(code)
    assert finished.code == 1, finished.output  # it was asked for
    line = "horovod-gloo  not installed: `syncbn install-horovod` builds"
    assert line in finished.output


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_a_doctor_that_is_ended_takes_the_ranks_along(launcher, tmp_path):
    hang = patience.limit(60)
    rank = f"import os, time; open(r'{tmp_path}/' + str(os.getpid()), 'w'); time.sleep({hang})"
    ranks = [sys.executable, "-c", rank]
    command = {
        "mpirun": processes.mpirun(2, *ranks),
        "horovodrun": processes.horovodrun(2, "gloo", *ranks),
    }[launcher]
    code = (
        "from syncbn._src.doctor.probe_processes import Command, run\n"
        f"run([Command({command!r}, {{}})], {hang})"
    )
    doctor = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=processes.ROOT,
        env=processes.environment(),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + patience.limit()
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline, "the ranks did not start"
            assert doctor.poll() is None, "the doctor has ended"
            time.sleep(0.1)
        doctor.send_signal(signal.SIGTERM)
        assert doctor.wait(patience.limit()) == 128 + signal.SIGTERM
    finally:
        doctor.kill()
        doctor.wait()
    # Killed is not yet gone.
    deadline = time.monotonic() + patience.limit()
    while any(is_alive(file.name) for file in tmp_path.iterdir()):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.05)


def is_alive(pid):
    """Whether a process runs; one that waits for its end to be noted does not."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
