"""What users of other packages have reported; docs/user-reports.md says which test covers what."""

import contextlib
import re
import time
import warnings

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import oracle
from tests.keras import KERAS_3, keras
from tests.processes import ROOT

TABLE = ROOT / "docs" / "user-reports.md"


def rows():
    """The table's rows, as lists of cells."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_report_is_there_once_and_linked():
    reports = [report for row in rows() for report in re.findall(r"\S+?#\d+(?=\])", row[0])]
    assert len(reports) == len(set(reports)) >= 40
    for row in rows():
        links = re.findall(r"\[(\S+?)\]\((\S+?)\)", row[0])
        assert ", ".join(f"[{report}]({url})" for report, url in links) == row[0]
        for report, url in links:
            name, _, number = report.partition("#")
            pattern = rf"https://github\.com/[\w-]+/{name}/(issues|pull)/{number}"
            assert re.fullmatch(pattern, url), url


def test_every_test_that_is_named_exists():
    name = r"`(tests/\S+?\.py)::(\w+)`"
    for row in rows():
        assert len(row) == 4, row
        assert re.search(name, row[-1]) or row[-1].startswith("not tested: "), row
    for path, test in re.findall(name, TABLE.read_text()):
        text = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{path}::{test}"


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_mask_may_have_dimensions_of_one(axis):
    """keras#19848: the elements that such a mask stands for were not counted."""
    x, dy = np.random.default_rng(0).normal(2, 3, (2, 5, 2, 3, 4))
    mask = np.array([[1, 0], [1, 1], [0, 0], [1, 0], [0, 1]], bool)[..., None]
    channels = x.shape[axis]
    truth = oracle.batch_normalization(
        x, dy, np.ones(channels), np.zeros(channels), axis=axis, mask=mask
    )
    layer = syncbn.SyncBatchNormalization(axis=axis, momentum=0.0)
    with tf.GradientTape() as tape:
        inputs = tf.constant(x, tf.float32)
        tape.watch(inputs)
        y = layer(inputs, training=True, mask=mask)
    dx = tape.gradient(y, inputs, output_gradients=tf.constant(dy, tf.float32))
    np.testing.assert_allclose(y, truth.y, atol=1e-5)
    np.testing.assert_allclose(dx, truth.dx, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, truth.variance.reshape(-1), rtol=1e-5)


def test_a_model_of_many_replicas_is_saved_in_seconds(mirrored, tmp_path):
    """tensorflow#32653: it took minutes, six seconds for each layer of ResNet-50."""
    layers = [syncbn.SyncBatchNormalization() for _ in range(53)]
    with mirrored(8).strategy.scope():
        model = keras.Sequential([keras.Input((3,)), *layers])
    start = time.monotonic()
    model.save(tmp_path / "model.keras")
    tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    assert time.monotonic() - start < 20  # it takes half a second on two cores


@pytest.fixture(params=["alone", "under a strategy"])
def model(request, mirrored):
    """A trained model."""
    alone = request.param == "alone"
    with contextlib.nullcontext() if alone else mirrored(2).strategy.scope():
        layers = [keras.layers.Dense(4), syncbn.SyncBatchNormalization(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((3,)), *layers])
        model.compile("sgd", "mse")
    model.fit(X, X[:, :1], batch_size=8, verbose=0)
    return model


X = np.random.default_rng(0).normal(2, 3, (16, 3)).astype("float32")


def gradient(call):
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(call(x) ** 2)
    return tape.gradient(loss, x)


def test_a_saved_model_has_gradients(model, tmp_path):
    """tensorflow#50005: custom gradients were not saved, so attacks and fine-tuning failed."""
    truth = gradient(lambda x: model(x, training=False))
    model.export(str(tmp_path / "exported"))
    served = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(gradient(served.serve), truth, rtol=1e-4, atol=1e-5)
    if not KERAS_3:  # whose SavedModels have the training call too
        model.save(tmp_path / "folder", save_format="tf")
        saved = tf.saved_model.load(str(tmp_path / "folder"))
        whole = gradient(lambda x: model(x, training=True))
        for training, expected in (False, truth), (True, whole):
            actual = gradient(lambda x, training=training: saved(x, training=training))
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_jit_compile_with_mixed_precision_under_a_strategy(mirrored):
    """keras#21366: LossScaleOptimizer and jit_compile=True crashed with a merge_call error."""
    with mirrored(2).strategy.scope():
        layers = [keras.layers.Dense(4, dtype="mixed_float16")]
        layers.append(syncbn.SyncBatchNormalization(dtype="mixed_float16", momentum=0.0))
        layers.append(keras.layers.Dense(1, dtype="float32"))
        model = keras.Sequential([keras.Input((3,)), *layers])
        optimizer = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.SGD(0.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.compile(optimizer, "mse", jit_compile=True)
    if not KERAS_3:
        with pytest.raises(NotImplementedError, match="XLA cannot compile a collective"):
            model.fit(X, X[:, :1], verbose=0)
        return
    assert any("Proceeding with `jit_compile=False`" in str(w.message) for w in caught)
    model.fit(X, X[:, :1], batch_size=16, verbose=0)
    seen = model.layers[0](X).numpy().astype("float64")
    np.testing.assert_allclose(layers[1].moving_variance, seen.var(0), rtol=1e-3)
