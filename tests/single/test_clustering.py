"""`compile_around_collectives`, which is of a whole process, so each test has its own."""

import pytest

from tests import processes

FLAGS = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"


def run(folder, *arguments, **env):
    command = processes.program("compiled_in_one_line", *arguments)
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=cluster_"
    env = {"XLA_FLAGS": flags, "FOLDER": str(folder), **env}
    finished = processes.run([("python", command, env)])
    assert finished.code == 0, finished.output


def test_one_call_at_the_start_is_enough(tmp_path):
    run(tmp_path, "at_the_start")


@pytest.mark.parametrize("start", ["operation", "model", "strategy", "dataset"])
def test_a_call_that_comes_too_late_is_an_error(start, tmp_path):
    run(tmp_path, "too_late", FLAGS, start)


def test_with_the_launchers_flags_it_is_never_too_late(tmp_path):
    run(tmp_path, "with_the_flags", TF_XLA_FLAGS=FLAGS)


def test_with_a_gpu_in_sight_it_may_come_at_any_time_and_is_for_the_gpu_alone(tmp_path):
    run(tmp_path, "with_a_gpu_in_sight")


def test_fit_is_compiled_around_collectives(tmp_path):
    run(tmp_path, "fit")
