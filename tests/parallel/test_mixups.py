"""Replicas that do different things: an error on all of them, in that step, and nothing moves."""

import os

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import syncbn
from tests import oracle
from tests.parallel.conftest import ENGINE

ERRORS = (RuntimeError, tf.errors.UnknownError)

by_name = pytest.mark.skipif(
    ENGINE.startswith("horovod"), reason="Horovod matches by name: another order is right, or waits"
)
on_one_level = pytest.mark.skipif(
    "+" in ENGINE, reason="replicas of one process are told before they send, and the others wait"
)


class Layers(tf.keras.layers.Layer):
    """Two layers of the same size, and one of another."""

    def __init__(self):
        super().__init__()
        self.parts = {
            name: syncbn.SyncBatchNormalization(momentum=0.0, epsilon=0.0, name=name)
            for name in "abc"
        }

    def build(self, shape):
        for name, part in self.parts.items():
            part.build((None, 2 if name == "c" else 3))
        super().build(shape)

    def call(self, x, calls):
        """Calls the layers of these names, and takes no gradient through those in capitals."""
        outputs = [
            self.parts[name.lower()](number * x[:, : channels(name)], training=True)
            for number, name in enumerate(calls, 1)
        ]
        return [
            tf.stop_gradient(y) if name.isupper() else y
            for y, name in zip(outputs, calls, strict=True)
        ]


def channels(name):
    return 2 if name in "cC" else 3


def forward_and_backward(layer, x, calls):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.add_n([tf.reduce_sum(y**3) for y in layer(x, calls=calls)])
    dx = tape.gradient(loss, x, unconnected_gradients="zero")
    # What comes behind the layers in a step of training: an exchange of gradients, which may be as
    # long as that of a layer.
    return loss, dx, syncbn.resolve().all_reduce_sum(tf.ones([6], tf.float64), "end")


def inputs(replicas, seed):
    rng = np.random.default_rng(seed)
    return [(tf.constant(rng.normal(size=(4, 3)), tf.float32),) for _ in range(replicas.size)]


def truth(whole, calls):
    """Returns the outputs' cubes, summed up for each sample, and the gradient of the whole sum."""
    loss, dx = np.zeros(len(whole)), np.zeros_like(whole)
    for number, name in enumerate(calls, 1):
        x = number * whole[:, : channels(name)]
        parameters = np.ones(channels(name)), np.zeros(channels(name))
        y = oracle.batch_normalization(x, np.zeros_like(x), *parameters, epsilon=0.0).y
        loss += (y**3).sum(1)
        if name.islower():
            gradient = oracle.batch_normalization(x, 3 * y**2, *parameters, epsilon=0.0).dx
            dx[:, : channels(name)] += number * gradient
    return loss, dx


def moving_means(layers):
    return {name: part.moving_mean.numpy() for name, part in layers[0].parts.items()}


# What the last replica does instead of "ab", and the layers that the error names.
FAULTS = {"ba": "ab", "b": "ab", "aa": "ab", "cb": "ac", "aB": "b", "abc": "c"}


@by_name
@on_one_level
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("calls", FAULTS)
def test_a_mixup_is_an_error_on_all_replicas_before_it_moves_anything(calls, graph, replicas):
    if ENGINE == "multiworker" and (graph or "c" in calls):
        pytest.skip("TensorFlow's workers do not go on after this: launchers/test_mixups.py")

    def step(layer, x):
        last = syncbn.resolve().rank == replicas.size - 1
        return forward_and_backward(layer, x, calls if last else "ab")

    def right(layer, x):
        return forward_and_backward(layer, x, "abc")

    layers = replicas.build(lambda rank: Layers(), (None, 3))
    replicas.run(right, layers, inputs(replicas, 1), graph)
    before = moving_means(layers)
    with pytest.raises(ERRORS, match=r"the same calls|the same ones in the same order") as raised:
        replicas.run(step, layers, inputs(replicas, 2), graph)
    for name in FAULTS[calls]:
        assert f"syncbn/{layers[0].parts[name].name}/" in str(raised.value)
    # What came before it was right. (Replicas of a strategy are found out before a graph runs.)
    expected = {"aa": "a", "aB": "ab", "abc": "ab"}.get(calls, "")
    after = moving_means(layers)
    moved = "".join(name for name in "abc" if not np.array_equal(before[name], after[name]))
    assert moved == ("" if graph and not replicas.separate else expected)
    # And the job could go on.
    arguments = inputs(replicas, 3)
    assert_right(replicas.run(right, layers, arguments, graph), arguments, "abc")


def assert_right(results, arguments, calls):
    whole = np.concatenate([x.numpy() for (x,) in arguments]).astype("float64")
    losses, dx = truth(whole, calls)
    for rank, (loss, gradient, _) in results.items():
        own = slice(4 * rank, 4 * rank + 4)
        np.testing.assert_allclose(loss, losses[own].sum(), atol=1e-3)
        np.testing.assert_allclose(gradient, dx[own], atol=1e-3 * max(1, np.abs(dx).max()))


EXAMPLES = int(os.environ.get("SYNCBN_TEST_EXAMPLES", "20"))


@st.composite
def schedules(draw):
    """Draws the calls of a step, and what another rank may make of them."""
    usual = draw(st.lists(st.sampled_from("abcaABC"), min_size=1, max_size=4))
    other = list(usual)
    for _ in range(draw(st.integers(0, 2))):
        first, second = (draw(st.integers(0, len(other))) for _ in range(2))
        what = draw(st.sampled_from(["swap", "skip", "replace", "repeat"]))
        if first == len(other) or second == len(other):
            continue
        if what == "swap":
            other[first], other[second] = other[second], other[first]
        elif what == "skip" and len(other) > 1:
            del other[first]
        elif what == "replace":
            other[first] = draw(st.sampled_from("abcABC"))
        elif what == "repeat":
            other.insert(second, other[first])
    return "".join(usual), "".join(other)


@pytest.mark.skipif(ENGINE != "mpi", reason="the engine on which a job goes on after any mix-up")
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
@hypothesis.given(schedule=schedules(), graph=st.booleans())
def test_any_mixup_that_can_be_drawn_is_right_or_an_error_on_all_ranks(schedule, graph, replicas):
    from mpi4py import MPI

    usual, other = schedule
    calls = other if replicas.rank == replicas.size - 1 else usual
    layers = replicas.build(lambda rank: Layers(), (None, 3))
    arguments = inputs(replicas, 1)
    try:
        results = replicas.run(
            lambda layer, x: forward_and_backward(layer, x, calls), layers, arguments, graph
        )
        if usual == other:
            assert_right(results, arguments, usual)
        end = "right" if usual == other else "a wrong number in silence"
    except AssertionError:
        end = "a wrong number"
    except ERRORS as error:
        end = "told" if "in the same order. Received: on rank 0" in str(error) else str(error)
    # All ranks give one verdict, or one of them would go on to draw without the others.
    ends = set(MPI.COMM_WORLD.allgather(end))
    assert ends == ({"right"} if usual == other else {"told"}), (usual, other, ends)
