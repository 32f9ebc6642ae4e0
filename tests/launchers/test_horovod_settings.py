"""A job under plain `horovodrun` is told what makes small messages fast."""

import re

import pytest

from tests import processes


@pytest.mark.parametrize(
    ("controller", "init", "cycle", "cache"),
    [("gloo", "plain", "1", "1024"), ("gloo", "ours", "0.1", "0"), ("mpi", "ours", "0.1", "1024")],
)
def test_rank_0_says_it_once_where_nothing_was_set(controller, init, cycle, cache):
    program = processes.program("prints_horovod_settings", init)
    command = processes.horovodrun(2, controller, *program)
    finished = processes.run([(controller, command, {})])
    assert finished.code == 0, finished.output
    # Without the tags of the launcher, which come anywhere.
    output = re.sub(r"\[[\d,]+\]<\w+>:", "", finished.output)
    said = re.findall(r"Horovod has HOROVOD_CYCLE_TIME=1.*set HOROVOD_CYCLE_TIME=0\.1", output)
    assert len(said) == (init == "plain"), finished.output
    settings = f"report: HOROVOD_CYCLE_TIME={cycle}, HOROVOD_CACHE_CAPACITY={cache}"
    assert settings in re.sub(r"\s+", " ", output), finished.output
