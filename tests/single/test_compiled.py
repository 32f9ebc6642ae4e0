"""What XLA compiles where there are GPUs, on a CPU: right, and traced only once."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.ops import kernels, xla
from tests import kinds_of_replicas as kinds
from tests.contract import Case, check
from tests.drawn_cases import RENORM, some_groups, splits

EVEN, RAGGED, LAST_EMPTY, _, EMPTY = splits(2)
NAN = float("nan")

# Few, since XLA compiles each piece for each shape.
CASES = [
    Case(LAST_EMPTY, steps=2, sample=(4, 6)),
    Case(EMPTY, sample=(4, 6)),
    Case(RAGGED, masked=True, poison=NAN),
    Case(RAGGED, axis=1, masked=True, unmasked=(0,)),
    Case(EVEN, axis=1, sample=(3, 4, 2)),
    Case(RAGGED, layer="SyncCentering", masked=True, poison=NAN),
    Case(EVEN, dtype="float16", options=RENORM, steps=2),
    Case(EVEN, dtype="bfloat16"),
    Case(EVEN, dtype="float64", options=(some_groups(2),)),
    Case(EVEN, mean=1e3, spread=10.0, sample=(16, 16, 4)),
    Case(EVEN, options=(("unbiased_moving_variance", True), ("scale", False))),
]


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    monkeypatch.setattr(xla, "on_gpus", lambda: True)


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_replicas_behave_as_one_with_the_whole_batch(case):
    check(kinds.Threads(2), case)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_one_replica_behaves_as_one(masked, graph):
    replicas = kinds.Strategy(tf.distribute.OneDeviceStrategy("CPU:0"))
    check(replicas, Case((3,), sample=(4, 6), masked=masked, graph=graph, steps=2))


def test_second_derivatives_are_those_of_the_formula():
    x, dy = (tf.random.stateless_normal([6, 3], [1, seed], dtype=tf.float64) for seed in (1, 2))

    def penalty(normalize):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = normalize(x)
            dx = inner.gradient(y, x, dy)
            value = tf.reduce_sum(tf.square(dx))
        return outer.gradient(value, x)

    def formula(x):
        mean, variance = tf.nn.moments(x, [0])
        return (x - mean) * tf.math.rsqrt(variance + 1e-3)

    layer = syncbn.SyncBatchNormalization(dtype="float64")
    layer.build((None, 3))
    ours = penalty(lambda x: layer(x, training=True))
    np.testing.assert_allclose(ours, penalty(formula), rtol=1e-9)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_forward_mode_goes_through_the_sums_of_centering(graph):
    x, tangent = tf.random.stateless_normal([2, 6, 3], [1, 2], dtype=tf.float64)
    layer = syncbn.SyncCentering(dtype="float64")
    layer.build((None, 3))

    def product(x):
        with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
            y = layer(x, training=True)
        return accumulator.jvp(y)

    ours = (tf.function(product) if graph else product)(x)
    np.testing.assert_allclose(ours, tangent - tf.reduce_mean(tangent, 0), rtol=1e-9)


def test_one_trace_serves_all_batch_sizes_and_layers_of_as_many_channels(monkeypatch):
    traces = []
    plain = kernels.scale_and_offset
    monkeypatch.setattr(
        "syncbn._src.ops.normalization.scale_and_offset",
        lambda *arguments: traces.append(1) or plain(*arguments),
    )
    layers = [syncbn.SyncBatchNormalization(epsilon=0.0123) for _ in range(3)]

    @tf.function(input_signature=[tf.TensorSpec([None, 5])])
    def step(x):
        for layer in layers:
            x = layer(x, training=True)
        return x

    for size in (4, 7):
        assert step(tf.random.stateless_normal([size, 5], [1, 2])).shape == (size, 5)
    assert len(traces) == 1


def test_tensorflow_warns_of_no_retracing_where_many_widths_follow_each_other(caplog):
    for channels in range(20, 26):
        syncbn.SyncCentering()(tf.ones([4, channels]), training=True)
    assert "retracing" not in caplog.text
