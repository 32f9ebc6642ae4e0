"""What layers have in common is traced once, and used only where it is the same."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.ops.shared_traces import shared


def twice(traced=None):
    """Doubles a tensor, and notes each trace."""

    @shared
    def function(x):
        if traced is not None:
            traced.append(tuple(x.shape))
        return 2 * x

    return function


def calls(graph):
    return [one for one in graph.get_operations() if "PartitionedCall" in one.type]


def test_one_trace_for_like_shapes_in_all_graphs():
    traced = []
    function = twice(traced)
    for _ in range(2):
        step = tf.function(lambda x: [function(x + i) for i in range(3)] + [function(x[0])])
        *rows, first = step(tf.ones([2, 3]))
        np.testing.assert_array_equal(rows, [np.full((2, 3), 2.0 + 2 * i) for i in range(3)])
        np.testing.assert_array_equal(first, [2, 2, 2])
    assert traced == [(2, 3), (3,)]


def test_eager_calls_trace_nothing():
    traced = []
    function = twice(traced)
    for _ in range(2):
        np.testing.assert_array_equal(function(tf.ones([2])), [2, 2])
    assert traced == [(2,), (2,)]


@pytest.mark.parametrize("wide", [False, True])
def test_a_trace_stays_where_its_callers_are(wide):
    # The first caller's device is not that of the others.
    function = twice()
    shape = [1 << 9, 1 << 9] if wide else [3]

    @tf.function
    def step(x):
        with tf.device("CPU:0"):
            y = function(x)
        with tf.device("CPU:1"):
            return y, function(x)

    concrete = step.get_concrete_function(tf.TensorSpec(shape))
    devices = [tf.DeviceSpec.from_string(one.device) for one in calls(concrete.graph)]
    assert [one.device_index for one in devices] == [0, 1]
    (body,) = (one for one in concrete.graph.as_graph_def().library.function)
    assert not any(node.device for node in body.node_def)
    # Functions of many elements are called; those of few are inlined.
    assert ("_noinline" in body.attr) == wide


def test_a_trace_made_outside_of_xla_is_not_used_inside():
    layer = syncbn.SyncBatchNormalization(momentum=0.0)
    x = np.random.default_rng(0).normal(30, 1, size=(4096, 64)).astype("float32")
    plain = tf.function(lambda x: layer(x, training=True))
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    # The kernel outside of XLA is trusted to a ten-thousandth of a variance.
    np.testing.assert_allclose(plain(x), compiled(x), atol=1e-4)
    np.testing.assert_allclose(layer.moving_variance, x.astype("float64").var(0), rtol=2e-6)


@pytest.mark.parametrize("shape", [(4, 3), (64, 2048)], ids=["few", "many"])
def test_a_layer_adds_few_operations_to_a_graph(shape):
    """Plain layers of Keras 3 add 83; tracing and optimizing a model takes as long as it is big."""
    sizes = []
    for number in (1, 3):
        layers = [syncbn.SyncBatchNormalization() for _ in range(number)]

        def step(x, layers=layers):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = x
                for layer in layers:
                    y = layer(y, training=True)
            return tape.gradient(y, [x, *[one.gamma for one in layers]])

        for layer in layers:
            layer.build(shape)
        graph = tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec(shape)).graph
        sizes.append(len(graph.get_operations()))
    assert (sizes[1] - sizes[0]) / 2 < 60, sizes
