"""Jobs that are started wrongly end soon, and say why. (test_training.py kills workers.)"""

import pytest

from tests import processes


@pytest.mark.parametrize("program", ["engines_not_initialized", "one_process_of_several"])
def test_an_engine_that_cannot_synchronize_is_refused(program):
    # Open MPI from PyPI finds itself only through its mpirun.
    command = processes.mpirun(1, *processes.program(program))
    finished = processes.run([("mpirun", command, {})])
    assert finished.code == 0, finished.output


def test_parameter_servers_are_refused():
    finished = processes.run([("python", processes.program("parameter_server"), {})])
    assert finished.code == 0, finished.output
    assert "refused" in finished.output, finished.output
