"""`syncbn.report`: what a model's layers send, and what that costs."""

import io
import json
import math
import time

import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

import syncbn
from syncbn._src import cli
from syncbn._src.models.communication_report import Payload, report
from tests.keras import KERAS_3, keras


class Counting(syncbn.LocalCommunicator):
    """One replica that notes what it would send."""

    def __init__(self):
        self.sent = []

    def all_reduce_sum(self, tensor, name):
        self.sent.append(Payload(tensor.shape.num_elements(), tensor.dtype.name))
        return tensor


class Four(syncbn.LocalCommunicator):
    """As if there were three more replicas with the same batch."""

    size = 4

    def all_reduce_sum(self, tensor, name):
        return 4 * tensor


class LikeHorovod(Four):
    name = "horovod"


def sequential(*layers, shape=(7, 5), **options):
    return keras.Sequential([keras.Input(shape, **options), *layers])


def row(model, name, *arguments):
    (found,) = (one for one in report(model, *arguments).layers if one.name == name)
    return found


@pytest.mark.parametrize("arguments", [(), ("auto",)])
def test_a_single_replica_is_told_what_several_would_send(arguments):
    # So large that one replica alone would take other kernels, which send nothing.
    model = sequential(syncbn.SyncBatchNormalization(name="norm"), shape=(56, 56, 64))
    found = row(model, "norm", *arguments)
    assert (found.forward, found.backward) == (((129, "float64"),), ((128, "float64"),))


SEVERAL_AXES = [(syncbn.SyncCentering, {"axis": (1, 2)}, [(70, "float64")], [(35, "float64")])]


@pytest.mark.parametrize(
    ("make", "options", "forward", "backward"),
    [
        (syncbn.SyncBatchNormalization, {}, [(11, "float64")], [(10, "float64")]),
        (syncbn.SyncBatchNormalization, {"axis": 1}, [(21, "float64")], [(14, "float64")]),
        (syncbn.SyncBatchNormalization, {"dtype": "float64"}, [(11, "float64")], [(10, "float64")]),
        (
            syncbn.SyncBatchNormalization,
            {"dtype": "mixed_float16", "center": False, "scale": False},
            [(11, "float64")],
            [(10, "float64")],
        ),
        (syncbn.SyncBatchNormalization, {"virtual_batch_size": 2}, [(11, "float64")], []),
        (syncbn.SyncBatchNormalization, {"momentum": None}, [(11, "float64")], [(10, "float64")]),
        (syncbn.SyncCentering, {}, [(6, "float64")], [(5, "float64")]),
        (syncbn.SyncCentering, {"axis": 1}, [(14, "float64")], [(7, "float64")]),
        *([] if KERAS_3 else SEVERAL_AXES),
    ],
)
def test_the_table_says_what_a_layer_sends(make, options, forward, backward):
    communicator = Counting()
    layer = make(name="norm", communicator=communicator, **options)
    found = row(sequential(layer), "norm")
    communicator.sent.clear()  # Keras may have tried the layer out

    x = tf.cast(np.random.default_rng(1).normal(size=(4, 7, 5)), layer.compute_dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    count = len(communicator.sent)
    tape.gradient(y, x)

    assert [*found.forward] == communicator.sent[:count] == forward
    assert [*found.backward] == communicator.sent[count:] == backward
    assert found.collectives == (len(forward), len(backward))
    assert found.bytes == tuple(
        sum(8 * elements for elements, _ in sent) for sent in (forward, backward)
    )
    assert (found.input_shape, found.engine, found.seconds) == ((None, 7, 5), "local", None)
    axis = options.get("axis", -1)
    axes = [axis] if isinstance(axis, int) else axis
    assert found.channels == math.prod((None, 7, 5)[axis] for axis in axes)


@pytest.fixture
def model():
    class Foreign(keras.layers.BatchNormalization):
        pass

    frozen = syncbn.SyncBatchNormalization(name="frozen")
    frozen.trainable = False
    return sequential(
        keras.Sequential([keras.Input((7, 5)), syncbn.SyncCentering(name="inner")], name="block"),
        frozen,
        syncbn.SyncBatchNormalization(name="alone", communicator="local"),
        keras.layers.BatchNormalization(name="plain"),
        keras.layers.BatchNormalization(name="hosts", synchronized=True),
        Foreign(name="foreign"),
        keras.layers.Dense(2, name="dense"),
        syncbn.SyncBatchNormalization(name="last", communicator="mpi"),
    )


def test_every_normalization_has_a_row_and_what_does_not_synchronize_a_note(model):
    found = report(model)
    assert [(one.name, one.engine, one.collectives, one.note) for one in found.layers] == [
        ("block/inner", "auto", (1, 1), ""),
        ("frozen", "auto", (0, 0), "frozen"),
        ("alone", "local", (0, 0), "each replica alone"),
        ("plain", None, (0, 0), "not synchronized"),
        ("hosts", None, (0, 0), "not a layer of syncbn"),
        ("foreign", None, (0, 0), "not a layer of syncbn"),
        ("last", "mpi", (1, 1), ""),
    ]
    assert found.total.collectives == (2, 2)
    assert found.total.bytes == (8 * (6 + 5), 8 * (5 + 4))
    assert found.advice == (
        "1 BatchNormalization layer uses the statistics of each replica alone: "
        "syncbn.convert_sync_batchnorm(model) makes it a synchronized one.",
    )


def test_a_frozen_layer_needs_no_advice():
    model = sequential(keras.layers.BatchNormalization(name="plain"))
    assert (row(model, "plain").note, len(report(model).advice)) == ("not synchronized", 1)
    model.get_layer("plain").trainable = False
    assert (row(model, "plain").note, len(report(model).advice)) == ("frozen", 0)


def test_it_changes_nothing(model):
    before = model.get_weights()
    report(model)
    assert len(model.get_weights()) == len(before)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_model_that_is_not_built_has_no_numbers_yet():
    model = keras.Sequential([syncbn.SyncBatchNormalization(name="norm")])
    assert row(model, "norm").note == "not built"
    assert row(model, "norm").input_shape is None
    assert report(keras.Sequential([keras.layers.Dense(1)])).layers == ()


def test_as_text_it_is_a_table(model):
    lines = str(report(model)).splitlines()
    assert lines[0].split() == [
        "layer",
        "input",
        "channels",
        "engine",
        "collectives",
        "bytes",
        "ms",
        "note",
    ]
    cells = {line.partition("  ")[0].strip(): line for line in lines[2:]}
    assert "(None, 7, 5)" in cells["block/inner"]
    assert "1 + 1" in cells["block/inner"]
    assert "48 + 40" in cells["block/inner"]
    assert cells["frozen"].endswith("frozen")
    assert "2 + 2" in cells["total"]
    assert lines[-1].startswith("- 1 BatchNormalization layer")


def test_rich_prints_it_as_a_table_of_its_own(model):
    console = Console(file=io.StringIO(), width=120)
    console.print(report(model))
    text = console.file.getvalue()
    for part in ("block/inner", "(None, 7, 5)", "48 + 40", "not synchronized", "convert_sync"):
        assert part in text


def test_with_a_communicator_the_cost_of_a_step_is_measured():
    model = sequential(syncbn.SyncBatchNormalization(name="a"), syncbn.SyncCentering(name="b"))
    start = time.monotonic()
    found = report(model, Four())
    took = time.monotonic() - start
    assert (found.engine, found.size, found.advice) == ("local", 4, ())
    assert all(0 < one.seconds < took for one in found.layers)
    assert found.total.seconds == pytest.approx(sum(one.seconds for one in found.layers))
    assert "Measured over local, 4 replicas." in str(found)
    assert f"{1e3 * found.total.seconds:.3g}" in str(found)


def test_one_replica_sends_nothing():
    found = report(sequential(syncbn.SyncBatchNormalization()), "local")
    assert found.total.seconds is None
    assert "one replica here" in str(found)


def test_under_a_strategy_it_finds_the_replicas(mirrored):
    strategy = mirrored(2).strategy
    with strategy.scope():
        model = sequential(syncbn.SyncBatchNormalization(name="norm"))
        inside = report(model, "auto")
    for found in inside, report(model, "auto"):
        assert (found.engine, found.size) == ("tf.distribute", 2)
        assert found.layers[0].collectives == (1, 1)
        assert found.layers[0].seconds > 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [(16, None), (32, None), (33, "group_size=2 makes it 66"), (100, "communicator='local'")],
)
def test_it_advises_groups_where_the_batch_is_known_to_be_large(batch, message):
    model = sequential(syncbn.SyncBatchNormalization(), batch_size=batch)
    advice = report(model, Four()).advice
    assert len(advice) == (message is not None)
    assert message is None or message in advice[0]


def test_it_knows_what_slows_horovod_down(monkeypatch):
    monkeypatch.setenv("HOROVOD_CONTROLLER", "mpi")
    monkeypatch.delenv("HOROVOD_CYCLE_TIME", raising=False)
    found = report(sequential(syncbn.SyncCentering()), LikeHorovod())
    assert "4 replicas, with HOROVOD_CYCLE_TIME=1, HOROVOD_CACHE_CAPACITY=1024." in str(found)
    assert "set HOROVOD_CYCLE_TIME=0.1 before" in found.advice[0]
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.1")
    found = report(sequential(syncbn.SyncCentering()), LikeHorovod())
    assert "4 replicas, with HOROVOD_CYCLE_TIME=0.1, HOROVOD_CACHE_CAPACITY=1024." in str(found)
    assert found.advice == ()


def test_it_is_made_between_steps():
    model = sequential(syncbn.SyncBatchNormalization())

    @tf.function
    def step():
        report(model, "auto")

    with pytest.raises(RuntimeError, match=r"must be called eagerly.*between steps"):
        step()


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="must be one of 'auto'"):
        report(sequential(syncbn.SyncBatchNormalization()), "nccl")


HERE = "tests.single.test_report"


def build_model():
    plain = keras.layers.BatchNormalization(name="plain")
    return sequential(syncbn.SyncBatchNormalization(name="own"), plain)


def failing():
    raise OSError("the disk is gone")


def test_the_command_prints_the_report(capsys):
    assert cli.main(["report", f"{HERE}:build_model"]) == 0
    assert capsys.readouterr().out == f"{report(build_model())}\n"


def test_the_command_prints_json(capsys):
    assert cli.main(["report", f"{HERE}:build_model", "--json", "--communicator", "local"]) == 0
    found = json.loads(capsys.readouterr().out)
    own, plain = found["layers"]
    assert (own["name"], own["bytes"], own["collectives"]) == ("own", [88, 80], [1, 1])
    assert own["forward"] == [{"elements": 11, "dtype": "float64"}]
    assert plain["note"] == "not synchronized"
    assert found["total"]["bytes"] == [88, 80]
    assert (found["engine"], found["size"]) == ("local", 1)


@pytest.mark.parametrize(
    ("name", "message", "traceback"),
    [
        (HERE, "given as module:function. Received: tests", False),
        ("no_such:model", "There is no module no_such. Received: no_such:model, looked for", False),
        (f"{HERE}:nobody", f"{HERE} has no function nobody", False),
        (f"{HERE}:failing", "OSError: the disk is gone", True),
    ],
)
def test_the_command_says_what_it_cannot_do(name, message, traceback, capsys):
    assert cli.main(["report", name]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert ("Traceback" in error) == traceback
