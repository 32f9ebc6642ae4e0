"""What users of other packages have reported; docs/user-reports.md says which test covers what."""

import contextlib
import re
import time
import warnings

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import oracle, patience
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
    assert time.monotonic() - start < patience.limit()  # it takes half a second on two cores


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


class Branches(keras.Model):
    """Takes a branch at each step, as a filter that has to settle does."""

    def __init__(self):
        super().__init__()
        self.settling = syncbn.SyncBatchNormalization(momentum=0.5)
        self.settled = syncbn.SyncBatchNormalization()

    def call(self, x, training=None):
        for _ in range(3):
            x = tf.cond(
                tf.reduce_max(x) > -1e9,
                lambda x=x: x + tf.sin(self.settling(x, training=training)),
                lambda x=x: x - tf.sin(self.settled(x, training=training)),
            )
        return x


def test_branches_one_after_another_are_fitted():
    """tensorflow#39874: eagerly they worked, and in `fit` they raised a bare AssertionError."""
    model = Branches()
    for layer in model.settling, model.settled:
        layer.build((None, 3))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(X, X**2, batch_size=len(X), verbose=0)

    gamma, beta, x = tf.ones([3], tf.float64), tf.zeros([3], tf.float64), tf.constant(X, tf.float64)
    target, moving = x**2, np.zeros(3)
    with tf.GradientTape() as tape:
        tape.watch([gamma, beta])
        for _ in range(3):
            mean = tf.reduce_mean(x, 0)
            moving = (moving + mean.numpy()) / 2
            variance = tf.reduce_mean((x - mean) ** 2, 0)
            x += tf.sin(gamma * (x - mean) / tf.sqrt(variance + 1e-3) + beta)
        loss = tf.reduce_mean((x - target) ** 2)
    dgamma, dbeta = tape.gradient(loss, [gamma, beta])
    np.testing.assert_allclose(model.settling.gamma, gamma - dgamma, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.settling.beta, beta - dbeta, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.settling.moving_mean, moving, rtol=1e-5)
    for weight, initial in zip(model.settled.get_weights(), (1, 0, 0, 1), strict=True):
        np.testing.assert_array_equal(weight, np.full(3, initial))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_forward_mode_follows_the_moving_statistics(training, graph):
    """pytorch#73541: tangents of them ended with an error that did not say what was wrong."""
    rng = np.random.default_rng(0)
    layer = syncbn.SyncBatchNormalization(dtype="float64")
    layer.build((None, 3))
    weights = rng.uniform(1, 2, size=(4, 3))
    layer.set_weights(list(weights))
    x, *tangents = rng.normal(size=(6, 8, 3))
    tangents = [tangents[0], *(tangent[0] for tangent in tangents[1:])]
    variables = [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
    variables = [variable.value if KERAS_3 else variable for variable in variables]

    def product(x):
        with tf.autodiff.ForwardAccumulator([x, *variables], tangents) as accumulator:
            y = layer(x, training=training)
        return accumulator.jvp(y)

    def plain(x, gamma, beta, mean, variance):
        if training:  # by which they move, and of which nothing comes
            mean, variance = x.mean(0), x.var(0)
        return gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta

    tangents = [tf.constant(tangent) for tangent in tangents]
    ends = (
        plain(*(value + way * t.numpy() for value, t in zip((x, *weights), tangents, strict=True)))
        for way in (1e-6, -1e-6)
    )
    truth = (next(ends) - next(ends)) / 2e-6
    ours = (tf.function(product) if graph else product)(tf.constant(x))
    np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-7)
