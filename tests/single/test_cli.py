"""`python -m syncbn`: its arguments, its words, and what the doctor does with what it finds."""

import io
import json
import os
import sys
import time
import types

import pytest

import syncbn
from syncbn._src import bench_command, cli, launch_command, terminal
from syncbn._src.doctor import engines, examine, probe_processes
from syncbn._src.doctor.examine import Result
from syncbn._src.doctor.probe_processes import Command
from tests import patience, processes
from tests.launchers.test_doctor import is_alive

PROBE = ["python", "probe"]


def python(code, **environment):
    return Command([sys.executable, "-c", code], environment)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program on the PATH, and nothing else, that prints some lines."""
    monkeypatch.setattr(engines, "program_path", lambda: str(tmp_path))

    def make(name, output):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat <<'end'\n{output}\nend\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def horovod(monkeypatch):
    """A Horovod that was built with MPI, and without Gloo."""
    built = {"gloo_built": lambda: False, "mpi_built": lambda: True, "nccl_built": lambda: 0}
    monkeypatch.setattr(engines, "_horovod", lambda: types.SimpleNamespace(**built))


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"syncbn {syncbn.__version__}\n"


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: syncbn {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["nurse"], "invalid choice: 'nurse'"),
        (["doctor", "--engine", "nccl"], "invalid choice: 'nccl'"),
        *(
            (["doctor", "--limit", limit], f"positive number of seconds. Received: '{limit}'")
            for limit in ("0", "-1", "nan", "inf", "x")
        ),
        (["check"], "module:function"),
        (["check", "a:b"], "--input-shape"),
        (["check", "a:b", "--input-shape", "8;8"], "such as 3,1. Received: 8;8"),
        (["check", "a:b", "--input-shape", "8", "--split", "3,x"], "such as 3,1. Received: 3,x"),
        (["check", "a:b", "--input-shape", "8", "--batch", "0"], "a positive whole number"),
        *(
            (["advise", "a:b", "--batch-from", "a:c", option, "0"], "a positive whole number")
            for option in ("--replicas", "--batch", "--batches")
        ),
        (["launch"], "ENGINE"),
        (["launch", "nccl", "--", "true"], "invalid choice: 'nccl'"),
        (["report"], "module:function"),
    ],
    ids=str,
)
def test_wrong_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_module_is_looked_for_in_the_working_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "lacking.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert cli.main(["report", "lacking.py:model"]) == 2
    assert "by its name, without .py. Received: lacking.py:model" in capsys.readouterr().err
    assert cli.main(["report", "lacking:model"]) == 2
    assert 'lacking.py", line 1, in <module>' in capsys.readouterr().err
    # Where other ranks would wait for this one, the error ends the job.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        cli.main(["report", "lacking:model"])


@pytest.fixture
def no_benchmarks(tmp_path, monkeypatch):
    """As if the package had none, beside another one's `benchmarks`."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "command.py").write_text("raise AssertionError('another one')")
    monkeypatch.setattr(bench_command, "BUNDLED", tmp_path / "syncbn")


def test_bench_has_the_options_of_the_benchmarks(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--help"])
    assert end.value.code == 0
    assert "--repeats N" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--help"], ["--list", "--case", "tiny"]], ids=str)
def test_bench_without_the_benchmarks_says_where_they_are(options, no_benchmarks, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *options])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "the benchmarks were left out of this package" in error
    assert "Install the wheel, or run `python -m syncbn bench` in a checkout" in error


def test_bench_is_listed_without_the_benchmarks(no_benchmarks, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "bench          time the layers" in capsys.readouterr().out


def test_bench_takes_the_benchmarks_of_its_checkout(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError('another one')")
    monkeypatch.syspath_prepend(tmp_path)
    path = list(sys.path)
    assert cli.main(["bench", "--list"]) == 0
    assert "target-mirrored " in capsys.readouterr().out
    assert sys.path == path


def test_only_bench_imports_the_benchmarks(monkeypatch):
    for name in "benchmarks", "benchmarks.measuring.command":
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--help"])
    assert end.value.code == 0
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench", "--help"])


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result("mpi", "ok", 0.0512), "ok 0.05 ms"),
        (Result("mpi", "ok", 1.25, advice="set this"), "ok 1.25 ms: set this"),
        (Result("mpi", "missing", advice="install it"), "not installed: install it"),
        (
            Result("mpi", "failed", None, "why", "what", "a\nb"),
            "failed: why: what\n    | a\n    | b",
        ),
    ],
    ids=str,
)
def test_a_result_in_words(result, text):
    assert str(result) == text


@pytest.mark.parametrize(("last", "code"), [("ok", 0), ("missing", 1), ("failed", 1)])
def test_the_exit_code_says_whether_what_was_asked_for_works(last, code, capsys, monkeypatch):
    results = {"mpi": Result("mpi", "ok", 0.05), "mirrored": Result("mirrored", last, 1.0)}
    monkeypatch.setattr(examine, "try_out", lambda engine, limit: results[engine])
    monkeypatch.setattr(examine, "describe_machine", lambda: {"TensorFlow": "2"})
    arguments = ["doctor", "--engine", "mpi", "--engine", "mirrored"]
    assert cli.main(arguments) == code
    assert "TensorFlow    2\n" in (text := capsys.readouterr().out)
    assert "mpi           ok 0.05 ms\nmirrored      " in text
    assert cli.main([*arguments, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == {"TensorFlow": "2"}
    assert [(one["engine"], one["status"]) for one in found["engines"]] == [
        ("mpi", "ok"),
        ("mirrored", last),
    ]


@pytest.mark.parametrize(("last", "code"), [("ok", 0), ("missing", 0), ("failed", 1)])
def test_what_is_not_installed_is_no_fault_unless_asked_for(last, code, capsys, monkeypatch):
    monkeypatch.setattr(examine, "try_out", lambda engine, limit: Result(engine, last, 1.0))
    monkeypatch.setattr(examine, "describe_machine", lambda: {})
    assert cli.main(["doctor"]) == code


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "[a] \x1b[1;31mbad\x1b[0m 7\n"),
        ({"NO_COLOR": "1"}, "[a] \x1b[1mbad\x1b[0m 7\n"),
        ({"TERM": "dumb"}, "[a] bad 7\n"),
    ],
)
def test_a_terminal_has_colors_unless_it_is_asked_not_to(environment, text, monkeypatch):
    for name in "NO_COLOR", "FORCE_COLOR", "COLORTERM":
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    terminal.show("[a] bad 7", {"bad": terminal.BAD})
    assert sys.stdout.getvalue() == text


def test_a_pipe_gets_plain_lines_of_any_length(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal.show("[a] bad 7" + 300 * " long", {"bad": terminal.BAD})
    assert capsys.readouterr().out == "[a] bad 7" + 300 * " long" + "\n"


def test_a_launcher_must_not_start_the_doctor(capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cli.main(["doctor"]) == 2
    assert "OMPI_COMM_WORLD_SIZE=2. Run it once, by itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "package", "advice"),
    [
        ("mpi", "mpi4py", "pip install 'syncbn[mpi]'"),
        ("horovod-gloo", "horovod", "syncbn install-horovod"),
        ("horovod-mpi", "horovod", "syncbn install-horovod"),
    ],
)
def test_what_is_not_installed_is_missing_and_no_failure(engine, package, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = examine.try_out(engine, 1)
    assert (result.status, result.reason) == ("missing", "")
    assert advice in result.advice
    assert str(result).startswith("not installed: ")
    describe = engines.describe_mpi4py if package == "mpi4py" else engines.describe_horovod
    with pytest.raises(engines.Unusable):
        describe()


def test_a_controller_that_horovod_was_built_without_is_missing(horovod):
    assert examine.try_out("horovod-gloo", 1).reason == "this Horovod was built without gloo"


def test_a_package_that_does_not_load_has_failed(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    result = examine.try_out("horovod-gloo", 1)
    assert result.status == "failed"
    assert result.reason.startswith("import horovod.tensorflow: ")


@pytest.mark.parametrize("name", ["mpirun", "horovodrun"])
def test_a_launcher_that_is_not_there_is_missing(name, program, horovod, monkeypatch):
    monkeypatch.setattr(engines, "_mpi4py", lambda: None)
    if name == "horovodrun":
        program("mpirun", "mpirun (Open MPI) 4.1.8")
    engine = {"mpirun": "mpi", "horovodrun": "horovod-mpi"}[name]
    result = examine.try_out(engine, 1)
    assert (result.status, result.reason) == ("missing", f"no {name}")


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("mpirun (Open MPI) 4.1.8", ["--oversubscribe", "--bind-to", "none"]),
        ("mpirun (Open MPI) 5.0.5", ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]),
        ("HYDRA build details:\n    Version: 4.2", ["-bind-to", "none"]),
    ],
)
def test_each_mpirun_is_started_in_its_own_words(version, flags, program, monkeypatch):
    monkeypatch.setattr(engines, "_mpi4py", lambda: None)
    mpirun = program("mpirun", version)
    start, _ = engines.ENGINES["mpi"]
    assert start(PROBE) == [Command([mpirun, "-np", "2", *flags, *PROBE], {})]


def test_an_mpirun_of_nobody_we_know_is_refused(program, horovod, monkeypatch):
    monkeypatch.setattr(engines, "_mpi4py", lambda: None)
    program("mpirun", "mpirun of somebody")
    result = examine.try_out("mpi", 1)
    assert result.status == "failed"
    assert "of an unknown MPI" in result.reason
    program("mpirun", "mpirun (Open MPI) 5.0.5")
    result = examine.try_out("horovod-mpi", 1)
    assert result.status == "failed"
    assert "horovodrun needs Open MPI 4" in result.reason


def test_the_workers_of_a_cluster_are_told_of_each_other():
    start, _ = engines.ENGINES["multiworker"]
    configs = [json.loads(command.environment["TF_CONFIG"]) for command in start(PROBE)]
    assert [config["task"]["index"] for config in configs] == [0, 1]
    assert configs[0]["cluster"] == configs[1]["cluster"]
    assert len(set(configs[0]["cluster"]["worker"])) == 2


def test_a_proxy_between_the_workers_is_named(monkeypatch):
    failed = ("no end within 1 s", "")
    monkeypatch.setattr(probe_processes, "run", lambda commands, limit: failed)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    advice = examine.try_out("multiworker", 1).advice
    assert "http_proxy keeps workers from reaching each other" in advice
    assert examine.try_out("mirrored", 1).advice == ""


def test_root_hears_what_jobs_under_open_mpi_need(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", raising=False)
    assert probe_processes.root_needs() == "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    code = "import os; assert os.environ['OMPI_ALLOW_RUN_AS_ROOT_CONFIRM'] == '1'"
    assert probe_processes.run([python(code)], patience.limit()) == ("", "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert probe_processes.root_needs() == ""


def test_a_process_that_fails_ends_the_others_and_says_why():
    failing = python(
        "print('\\nWARNING: All log messages before\\nI0000 00:00 port.cc\\n[1]<stdout>:kept')\n"
        "raise ValueError('the reason')"
    )
    start = time.monotonic()
    hangs = 2 * patience.limit()
    reason, output = probe_processes.run(
        [failing, python(f"import time; time.sleep({hangs})")], hangs
    )
    assert time.monotonic() - start < hangs / 2
    assert reason == "ValueError: the reason"
    assert output.splitlines()[0] == "[1]<stdout>:kept"
    assert "port.cc" not in output


def test_a_process_without_words_has_its_exit_code():
    assert probe_processes.run([python("raise SystemExit(3)")], patience.limit()) == (
        "exit code 3",
        "",
    )
    assert (
        probe_processes.run([python("import os; os.abort()")], patience.limit())[0]
        == "exit code -6"
    )


def test_after_the_limit_no_process_is_left(tmp_path):
    # One that does not listen, and a child of its own.
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    # A hundred times what it takes to print.
    limit = 5 * patience.factor()
    reason, output = probe_processes.run([python(code)], limit)
    assert reason == f"no end within {limit:g} s"
    pids = output.split()
    assert len(pids) == 2
    # Killed is not yet gone.
    deadline = time.monotonic() + patience.limit()
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.05)


def test_children_get_no_cluster_of_this_process_and_no_gpu(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    code = (
        "import os; assert 'TF_CONFIG' not in os.environ and "
        "os.environ['CUDA_VISIBLE_DEVICES'] == '-1' and os.environ['OWN'] == '1'"
    )
    assert probe_processes.run([python(code, OWN="1")], patience.limit()) == ("", "")


class Replaced(BaseException):
    """Instead of the end of this process."""


@pytest.fixture
def replaced(monkeypatch):
    """Catches what this process would be replaced by, and its PATH."""

    def execv(path, arguments):
        raise Replaced([path, *arguments[1:]], os.environ["PATH"])

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def run(*words):
        with pytest.raises(Replaced) as caught:
            cli.main(words)
        return caught.value.args

    return run


def test_a_launcher_gets_all_words_behind_its_name(replaced):
    words = ["-np", "2", "--help", "--", "python", "train.py", "--", "$(id)", "a  b", ""]
    command, path = replaced("launch", "mpi", *words)
    assert command == ["/usr/bin/env", "bash", str(launch_command.LAUNCHERS / "mpi.sh"), *words]
    # The programs of this environment, also where it is not activated.
    assert path == f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    command, _ = replaced("launch", "multiworker", *words)
    assert command == [sys.executable, str(launch_command.LAUNCHERS / "multiworker.py"), *words]


def test_an_environment_that_is_activated_is_left_as_it_is(replaced, monkeypatch):
    mine = f"/mine:{os.path.dirname(sys.executable)}:/bin"
    monkeypatch.setenv("PATH", mine)
    assert replaced("launch", "mirrored", "true")[1] == mine


def test_horovod_is_installed_for_this_python(replaced):
    command, _ = replaced("install-horovod", "--nccl", "--help")
    script = str(launch_command.LAUNCHERS / "install_horovod.sh")
    assert command == [
        "/usr/bin/env",
        "bash",
        script,
        "--python",
        sys.executable,
        "--nccl",
        "--help",
    ]


def test_launchers_and_benchmarks_of_a_checkout_are_links():
    assert launch_command.LAUNCHERS.resolve() == processes.ROOT / "launch"
    assert (bench_command.BUNDLED / "benchmarks").resolve() == processes.ROOT / "benchmarks"
