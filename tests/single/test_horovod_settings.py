"""Horovod's settings for small messages."""

import logging
import os
import re
import sys
import types

import pytest

import syncbn
from syncbn._src.communicators import horovod_settings
from syncbn._src.communicators.horovod_settings import advice, in_force
from tests import processes

NAMES = ("HOROVOD_CYCLE_TIME", "HOROVOD_CACHE_CAPACITY")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in (*NAMES, "HOROVOD_AUTOTUNE", "HOROVOD_CONTROLLER", "HOROVOD_SIZE"):
        # Set first, so that what a test sets is taken away after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def hvd(monkeypatch):
    """A Horovod that notes what it is initialized with."""
    module = types.ModuleType("horovod.tensorflow")
    module.seen, module.initialized = [], False

    def init(**options):
        module.initialized = True
        module.seen.append(({name: os.environ.get(name) for name in NAMES}, options))

    module.init, module.is_initialized = init, lambda: module.initialized
    package = types.ModuleType("horovod")
    package.tensorflow = module
    monkeypatch.setitem(sys.modules, "horovod", package)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", module)
    return module


@pytest.mark.parametrize(
    ("controller", "size", "cycle", "cache"),
    [
        ("gloo", "2", "0.1", "0"),
        ("gloo", "8", "0.1", "0"),
        ("gloo", "9", "0.1", None),
        ("mpi", None, "0.1", None),
        (None, None, "0.1", None),
    ],
)
def test_horovod_is_initialized_with_what_small_messages_want(
    controller, size, cycle, cache, hvd, monkeypatch
):
    for name, value in (("HOROVOD_CONTROLLER", controller), ("HOROVOD_SIZE", size)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert advice() is not None
    syncbn.training.init_horovod(process_sets="dynamic")
    assert hvd.seen == [
        (dict(zip(NAMES, (cycle, cache), strict=True)), {"process_sets": "dynamic"})
    ]
    assert advice() is None
    with pytest.raises(RuntimeError, match="when it is initialized"):
        syncbn.training.init_horovod()


def test_the_cache_of_an_elastic_job_is_left_alone(hvd, monkeypatch):
    # Workers start with different sizes, and all need the same setting.
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    syncbn.training.init_horovod()
    assert hvd.seen == [({"HOROVOD_CYCLE_TIME": "0.1", "HOROVOD_CACHE_CAPACITY": None}, {})]


def test_what_the_environment_has_stays(hvd, monkeypatch):
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "2.5")
    monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "512")
    assert advice("gloo", 2) is None
    assert in_force("gloo", 2) == "HOROVOD_CYCLE_TIME=2.5, HOROVOD_CACHE_CAPACITY=512"
    syncbn.training.init_horovod()
    assert hvd.seen[0][0] == {"HOROVOD_CYCLE_TIME": "2.5", "HOROVOD_CACHE_CAPACITY": "512"}


def test_horovod_tunes_what_it_is_told_to_tune(hvd, monkeypatch):
    monkeypatch.setenv("HOROVOD_AUTOTUNE", "1")
    syncbn.training.init_horovod()
    assert hvd.seen[0][0] == dict.fromkeys(NAMES)


def test_without_horovod_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod", None)
    with pytest.raises(ImportError, match="syncbn install-horovod"):
        syncbn.training.init_horovod()


def test_the_advice_names_what_is_in_force_and_what_is_better(monkeypatch):
    text = advice("gloo", 2)
    for part in "CYCLE_TIME=1 ", "CAPACITY=1024,", "CYCLE_TIME=0.1 ", "CAPACITY=0 ":
        assert part in text
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.1")
    assert "CYCLE_TIME" not in advice("gloo", 2)
    assert advice("mpi", 2) is None
    monkeypatch.setenv("HOROVOD_AUTOTUNE", "1")
    assert advice("gloo", 2) is None


def test_it_is_logged_once(caplog):
    horovod_settings.advise_once.cache_clear()
    with caplog.at_level(logging.WARNING, "syncbn"):
        horovod_settings.advise_once()
        horovod_settings.advise_once()
    (record,) = caplog.records
    assert "HOROVOD_CYCLE_TIME=0.1" in record.getMessage()


def test_the_launcher_sets_the_same():
    script = (processes.ROOT / "launch" / "horovod.sh").read_text()
    values = dict(re.findall(r'export (HOROVOD_\w+)="\$\{\w+:-([\d.]+)\}"', script))
    for setting in horovod_settings.settings("gloo", 8):
        assert values[setting.name] == setting.better
