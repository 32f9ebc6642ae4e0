"""The plan of the house: what is public, which floor imports which, what an import loads."""

import ast
from pathlib import Path

import pytest

import syncbn
from tests import processes

PACKAGE = Path(syncbn.__file__).parent

FLOORS = {
    "syncbn._src.arguments": 0,
    "syncbn._src.autograph": 0,
    "syncbn._src.call_stack": 0,
    "syncbn._src.text_tables": 0,
    "syncbn._src.bundled": 0,
    "syncbn._src.named_functions": 0,
    "syncbn._src.option_types": 0,
    "syncbn._src.terminal": 0,
    "syncbn._src.ops": 0,
    "syncbn._src.watchdog": 0,
    "syncbn._src.communicators.base": 0,
    "syncbn._src.communicators.launcher": 0,
    "syncbn._src.communicators": 1,
    "syncbn._src.keras_compat": 1,
    "syncbn._src.layers": 2,
    "syncbn._src.training": 3,
    "syncbn._src.models": 3,
    "syncbn": 4,
}


def floor(module):
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def imports():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("syncbn"):
                for alias in node.names:
                    candidate = f"{node.module}.{alias.name}"
                    is_module = (PACKAGE.parent / candidate.replace(".", "/")).with_suffix(".py")
                    yield name, candidate if is_module.exists() else node.module


def test_the_public_names():
    assert sorted(syncbn.__all__) == [
        "Advice",
        "Communicator",
        "Conversion",
        "DistributeCommunicator",
        "Equivalence",
        "HorovodCommunicator",
        "LocalCommunicator",
        "MPICommunicator",
        "MovingStatistics",
        "Report",
        "SyncBatchNormalization",
        "SyncCentering",
        "advise",
        "assert_synchronized",
        "check_equivalence",
        "convert_sync_batchnorm",
        "moving_statistics",
        "recalibrate",
        "report",
        "resolve",
        "revert_sync_batchnorm",
        "set_moving_statistics",
        "training",
    ]
    assert sorted(syncbn.training.__all__) == [
        "AverageMetrics",
        "AverageStatistics",
        "BroadcastVariables",
        "CommitState",
        "DistributedGradientTape",
        "ElasticState",
        "Job",
        "LearningRateSchedule",
        "LearningRateWarmup",
        "PreemptionCheckpoint",
        "Recalibrate",
        "StatisticsMonitor",
        "broadcast",
        "compile_around_collectives",
        "distribute",
        "elastic",
        "evaluate",
        "init_horovod",
        "join",
        "mend_keras_fit",
        "prediction_variables",
        "rank_zero_only",
        "start",
    ]
    for module in syncbn, syncbn.training:
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_imports_go_down_only():
    found = list(imports())
    assert len(found) > 20
    for importer, imported in found:
        assert floor(imported) <= floor(importer), f"{importer} imports {imported}, which is above"


def test_engines_do_not_know_each_other():
    names = ("local", "tf_distribute", "horovod", "mpi", "nested")
    engines = {f"syncbn._src.communicators.{name}" for name in names}
    for importer, imported in imports():
        assert not (importer in engines and imported in engines), f"{importer} imports {imported}"


@pytest.mark.parametrize("legacy", ["0", "1"])
def test_importing_the_package_loads_no_engine(legacy):
    command = processes.program("what_importing_loads")
    finished = processes.run([("python", command, {"TF_USE_LEGACY_KERAS": legacy})])
    assert finished.code == 0, finished.output


def test_another_backend_of_keras_is_refused():
    # As if it were another: none of them is installed here.
    finished = processes.python(
        "import tensorflow as tf\ntf.keras.config.backend = lambda: 'jax'\nimport syncbn",
        TF_USE_LEGACY_KERAS="0",
    )
    assert finished.code != 0
    assert "KERAS_BACKEND=tensorflow" in finished.output


def definitions():
    """Yields each module of the repository, and each of its functions and classes.

    Those of tests only the modules, but for what pytest collects.
    """
    for folder in "syncbn", "launch", "benchmarks", "tests":
        for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
            if path.stem in ("__init__", "__main__", "conftest") or path.stem[:5] == "test_":
                continue
            # One that is overloaded is there several times.
            names = {one.name for one in ast.parse(path.read_text()).body if hasattr(one, "name")}
            yield path.stem, [name for name in names if name[0] != "_" and folder != "tests"]


def test_a_name_means_one_thing():
    modules, defined = [], []
    for module, names in definitions():
        modules.append(module)
        defined += names
    # What all commands have, and all scripts.
    hooks = {"add_arguments", "run", "main"}
    assert len(modules) > 80
    twice = [name for names in (modules, defined) for name in names if names.count(name) > 1]
    assert set(twice) <= hooks
    assert not set(modules) & set(defined)
