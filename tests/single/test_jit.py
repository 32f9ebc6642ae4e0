"""XLA: layers say whether they can be compiled, and refuse when they cannot."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators import tracing
from tests.keras import KERAS_3, keras


@pytest.mark.parametrize(
    ("communicator", "expected"),
    [("auto", True), ("local", True), ("mpi", False), ("horovod", False), ("tf.distribute", False)],
)
def test_a_layer_says_whether_its_engine_can_be_compiled(communicator, expected):
    assert syncbn.SyncBatchNormalization(communicator=communicator).supports_jit is expected
    assert syncbn.SyncCentering(communicator=communicator).supports_jit is expected


def test_auto_cannot_be_compiled_in_a_strategys_scope(mirrored):
    layer = syncbn.SyncBatchNormalization()
    with mirrored(2).strategy.scope():
        assert not layer.supports_jit


@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_one_replica_can_be_compiled_as_a_whole(make):
    compiled, plain = make(momentum=0.5), make(momentum=0.5)
    x = tf.constant(np.random.default_rng(0).normal(2, 3, size=(5, 4, 3)), tf.float32)
    results = []
    for layer, jit in ((compiled, True), (plain, False)):
        layer.build(x.shape)

        @tf.function(jit_compile=jit)
        def step(x, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(y**3)
            return y, tape.gradient(loss, x)

        results.append([*step(x), *layer.get_weights()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_an_engine_that_leaves_the_graph_is_refused_while_the_function_is_traced():
    @tf.function(jit_compile=True)
    def step():
        tracing.refuse_xla("MPI")

    with pytest.raises(NotImplementedError, match=r"XLA cannot compile.*MPI.*jit_compile=False"):
        step()

    @tf.function
    def not_compiled():
        tracing.refuse_xla("MPI")

    not_compiled()

    @tf.function(jit_compile=True)
    def outer():
        tf.function(lambda: tracing.refuse_xla("MPI"))()

    with pytest.raises(NotImplementedError, match="XLA cannot compile"):
        outer()


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no jit_compile='auto'")
def test_keras_asks_the_layers():
    model = keras.Sequential([keras.Input((3,)), syncbn.SyncCentering(communicator="mpi")])
    model.compile("sgd", "mse")
    assert not model.jit_compile
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
