"""Control flow and derivatives on every engine: what is found is what docs/control-flow.md says."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.control_flow_table import LAYERS, refusal, to_test
from tests.derivatives import unlike
from tests.parallel.conftest import ENGINE


@pytest.mark.parametrize("cell", to_test(ENGINE), ids=str)
def test_control_flow_gives_what_the_table_says(replicas, cell):
    assert not unlike(replicas, cell, refusal(ENGINE, cell))


@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_forward_mode_of_what_comes_after_a_collective(replicas, layer, branch):
    # The collective has no tangent, but is in the branch that TensorFlow differentiates.
    x = np.random.default_rng(0).normal(size=(replicas.size, 4, 3))
    factor, tangent = tf.constant([[1.0, 2.0, 3.0], [0.5, 1.0, -1.0]], tf.float64)

    def product(layer, x):
        def call():
            return (factor * layer(x, training=True)) ** 3

        with tf.autodiff.ForwardAccumulator(factor, tangent) as accumulator:
            y = tf.cond(tf.reduce_all(x > -1e9), call, lambda: x) if branch else call()
        return accumulator.jvp(y)

    layers = replicas.build(lambda rank: getattr(syncbn, layer)(dtype="float64"), (None, 3))
    inputs = [(tf.constant(part),) for part in x]
    if branch:
        sentence = "cannot follow a collective of" if replicas.separate else "`merge_call` called"
        with pytest.raises((NotImplementedError, RuntimeError), match=sentence):
            replicas.run(product, layers, inputs, graph=True)
        return
    y = x - x.mean((0, 1))
    if layer == "SyncBatchNormalization":
        y /= np.sqrt(x.var((0, 1)) + 1e-3)
    truth = 3 * (factor * y) ** 2 * tangent * y
    for rank, ours in replicas.run(product, layers, inputs, graph=True).items():
        np.testing.assert_allclose(ours, truth[rank], rtol=1e-9)
