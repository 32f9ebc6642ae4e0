"""XLA's automatic clustering: everything but the collectives is compiled, and nothing changes."""

import re

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import clusters
from tests.control_flow_table import Cell
from tests.derivatives import find
from tests.kinds_of_replicas import Strategy
from tests.parallel.conftest import ENGINE

pytestmark = pytest.mark.skipif(
    not clusters.ON,
    reason="XLA has to be asked before TensorFlow starts: set SYNCBN_TEST_CLUSTERS=FOLDER",
)

FEATURES, HIDDEN = 5, 7
EPSILON, MOMENTUM = 1e-3, 0.5


@pytest.fixture
def compiled():
    """Gives the text of the clusters that this process has compiled since."""
    before = set(clusters.compiled())
    return lambda: [path.read_text() for path in clusters.compiled() if path not in before]


def network(x, first, last, normalize, again):
    """Two normalizations, so that there is something before, between and after collectives."""
    hidden = normalize(tf.tanh(tf.matmul(x, first)))
    return tf.matmul(again(tf.sin(hidden)), last)


def truth(splits, x, dy, first, last, normalizes):
    """The mathematics on the whole batch, eagerly, which is not compiled, in float64.

    Each replica has parameters of its own, for its share of their gradients.
    """
    parts = [tf.constant(part) for part in np.split(x, np.cumsum(splits)[:-1])]
    weights = [(tf.constant(first), tf.constant(last)) for _ in splits]
    moving = []

    def normalize(hidden):
        whole = tf.concat(hidden, 0)
        mean, variance = tf.nn.moments(whole, [0])
        moving.append((mean, variance))
        scale = tf.math.rsqrt(variance + EPSILON) if normalizes else 1.0
        return [(one - mean) * scale for one in hidden]

    with tf.GradientTape() as tape:
        tape.watch([parts, weights])
        hidden = [tf.tanh(x @ first) for x, (first, _) in zip(parts, weights, strict=True)]
        hidden = normalize([tf.sin(one) for one in normalize(hidden)])
        y = [one @ last for one, (_, last) in zip(hidden, weights, strict=True)]
        whole = tf.concat(y, 0)
    gradients = tape.gradient(whole, [parts, weights], tf.constant(dy))
    return y, *gradients, moving


@pytest.mark.parametrize("split", ["equal", "ragged", "one empty"])
@pytest.mark.parametrize("name", ["SyncBatchNormalization", "SyncCentering"])
def test_a_step_is_compiled_around_its_collectives(name, split, replicas, compiled):
    size, rng = replicas.size, np.random.default_rng(0)
    splits = {"equal": [4] * size, "ragged": [3 + i for i in range(size)]}.get(
        split, [6, *[0] * (size - 1)]
    )
    x = rng.normal(1, 2, size=(sum(splits), FEATURES))
    dy = rng.normal(size=(len(x), 2))
    first, last = rng.normal(size=(FEATURES, HIDDEN)), rng.normal(size=(HIDDEN, 2))
    normalizes = name == "SyncBatchNormalization"
    options = {"epsilon": EPSILON} if normalizes else {}
    both = [
        replicas.build(
            lambda rank, suffix=suffix: getattr(syncbn, name)(
                momentum=MOMENTUM, dtype="float64", name=f"{split[:3]}_{suffix}", **options
            ),
            (None, HIDDEN),
        )
        for suffix in ("first", "second")
    ]
    second = both[1][0]

    def step(layer, x, dy, first, last):
        with tf.GradientTape() as tape:
            tape.watch([x, first, last])
            normalize, again = (lambda h, one=one: one(h, training=True) for one in (layer, second))
            y = network(x, first, last, normalize, again)
        return y, tape.gradient(y, [x, first, last], output_gradients=dy)

    ends = np.cumsum(splits)[:-1]
    arguments = [
        (tf.constant(own_x), tf.constant(own_dy), tf.constant(first), tf.constant(last))
        for own_x, own_dy in zip(np.split(x, ends), np.split(dy, ends), strict=True)
    ]
    results = replicas.run(step, both[0], arguments, graph=True)

    y, dx, shares, moving = truth(splits, x, dy, first, last, normalizes)
    for rank, (own_y, (own_dx, *own_shares)) in results.items():
        np.testing.assert_allclose(own_y, y[rank], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(own_dx, dx[rank], rtol=1e-9, atol=1e-9)
        for own, share in zip(own_shares, shares[rank], strict=True):
            np.testing.assert_allclose(own, share, rtol=1e-9, atol=1e-9)
    for layers, (mean, variance) in zip(both, moving, strict=True):
        statistics = replicas.moving(layers)
        for value in statistics["moving_mean"].values():
            np.testing.assert_allclose(value, MOMENTUM * mean, rtol=1e-9)
        for value in statistics.get("moving_variance", {}).values():
            np.testing.assert_allclose(value, MOMENTUM * (1 + variance), rtol=1e-9)
    if any(len(own_y) for own_y, _ in results.values()):
        # Of an empty batch TensorFlow itself makes constants.
        _is_compiled(replicas, compiled(), {"tanh", "sine", "cosine", "dot"})


def _is_compiled(replicas, modules, expected):
    text = "\n".join(modules)
    found = {operation for operation in expected if re.search(rf"\b{operation}\(", text)}
    assert found == expected, f"not compiled: {expected - found}, in {len(modules)} clusters"
    # Statistics are divided by counts that the collective brings, so there is a cluster before the
    # collectives and one behind; but one replica alone has none.
    assert len(modules) >= (1 if replicas.size == 1 else 2)
    assert "all-reduce" not in text


@pytest.mark.arithmetic
@pytest.mark.parametrize("rows", [6, 4096])  # the latter for the fused kernels
@pytest.mark.parametrize("mean", [60.0, 1e6])
def test_statistics_are_as_accurate_as_without(mean, rows, replicas, compiled):
    # One step, after which nothing is left of the initial values.
    x = np.random.default_rng(0).normal(mean, 1, size=(replicas.size, rows, 64)).astype("float32")
    layers = replicas.build(
        lambda rank: syncbn.SyncBatchNormalization(momentum=0.0, name=f"l{rows}_{int(mean)}"),
        (None, 64),
    )
    arguments = [(tf.constant(part),) for part in x]

    def step(layer, x):
        y = layer(tf.nn.relu(x), training=True)
        return tf.sin(y) * tf.exp(-y * y) + 2 * y  # several operations, or it is not worth it

    results = replicas.run(step, layers, arguments, graph=True)
    wide = x.astype("float64")
    own, centered = wide.var((0, 1)), wide - wide.mean((0, 1))
    for value in replicas.moving(layers)["moving_variance"].values():
        np.testing.assert_allclose(value, own, rtol=2e-6 if mean < 1e3 else 2e-3)
    for rank, y in results.items():
        truth = centered[rank] / np.sqrt(own + 1e-3)
        truth = np.sin(truth) * np.exp(-truth * truth) + 2 * truth
        np.testing.assert_allclose(y, truth, atol=1e-5 if mean < 1e3 else 5e-3)
    assert "sine(" in "\n".join(compiled())


@pytest.mark.parametrize("construct", ["tf.cond", "tf.while_loop"])
@pytest.mark.parametrize("layer", ["SyncBatchNormalization", "SyncCentering"])
def test_branches_and_loops_have_the_gradients_that_they_have_without(layer, construct, replicas):
    if isinstance(replicas, Strategy):
        pytest.skip("TensorFlow has no collectives of a strategy in branches and loops")
    assert find(replicas, Cell(layer, True, construct, "gradients")) == "right"


@pytest.mark.parametrize("layer", ["SyncBatchNormalization", "SyncCentering"])
def test_second_derivatives_are_those_that_there_are_without(layer, replicas):
    if ENGINE == "local":
        # Their sum over replicas is made by a collective, which one replica has no use for.
        pytest.skip("`find` adds up over an engine")
    assert find(replicas, Cell(layer, True, "none", "second derivatives")) == "right"
