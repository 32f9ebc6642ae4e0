"""How many collectives there are, how large, in which order; and that they have gradients."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.communicators.fingerprints import LENGTH
from tests import oracle
from tests.derivatives import delayed
from tests.parallel.conftest import ENGINE

# Calls of workers of tf.distribute meet by their order, so each says which it is.
MORE = LENGTH if ENGINE == "multiworker" else 0


def collectives(operations):
    """The operations in which replicas meet.

    The replicas of a MirroredStrategy on CPUs share one addition; those of other engines have an
    operation each.
    """
    types = ("CollectiveReduceV2", "HorovodAllreduce", "PyFunc")
    return [
        operation
        for operation in operations
        if operation.type in types
        or (operation.type == "AddN" and operation.name.endswith("all_reduce_sum"))
    ]


def forward_and_backward(layer, x, *_):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) ** 3)
    return tape.gradient(loss, x)


def arguments(replicas, *shape):
    rng = np.random.default_rng(1)
    return [(tf.constant(rng.normal(size=shape), tf.float32),) for _ in range(replicas.size)]


@pytest.mark.parametrize(
    ("layer", "forward", "backward"),
    [(syncbn.SyncBatchNormalization, 2 * 5 + 1, 2 * 5), (syncbn.SyncCentering, 5 + 1, 5)],
)
def test_there_is_one_collective_forward_and_one_backward(layer, forward, backward, replicas):
    layers = replicas.build(lambda rank: layer(), (None, 3, 5))
    replicas.run(forward_and_backward, layers, arguments(replicas, 4, 3, 5), graph=True)
    payloads = collections.Counter(
        operation.inputs[0].shape.num_elements() for operation in collectives(replicas.operations)
    )
    assert payloads == {forward + MORE: 1, backward + MORE: 1}


@pytest.mark.parametrize("options", [{}, {"renorm": True}], ids=str)
def test_groups_learn_of_each_other_by_one_collective_or_a_small_one_more(options, replicas):
    layers = replicas.build(
        lambda rank: syncbn.SyncBatchNormalization(group_size=1, **options), (None, 3, 5)
    )
    replicas.run(forward_and_backward, layers, arguments(replicas, 4, 3, 5), graph=True)
    payloads = collections.Counter(
        operation.inputs[0].shape.num_elements() for operation in collectives(replicas.operations)
    )
    if replicas.separate:
        assert payloads == {2 * 5 + 1: 2, 2 * 5: 1}
    else:
        groups = replicas.size
        assert payloads == {groups * (2 * 5 + 1) + MORE: 1, groups * 2 * 5 + MORE: 1}


def test_virtual_batches_have_one_collective_forward_and_none_backward(replicas):
    layers = replicas.build(
        lambda rank: syncbn.SyncBatchNormalization(virtual_batch_size=2), (None, 3, 5)
    )
    replicas.run(forward_and_backward, layers, arguments(replicas, 4, 3, 5), graph=True)
    (only,) = collectives(replicas.operations)
    assert only.inputs[0].shape.num_elements() == 2 * 5 + 1 + MORE


def test_inference_communicates_with_nobody(replicas):
    def infer(layer, x):
        return layer(x, training=False)

    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(), (None, 3, 5))
    replicas.run(infer, layers, arguments(replicas, 4, 3, 5), graph=True)
    assert not collectives(replicas.operations)
    # Which is what a custom gradient leaves in a graph.
    assert "IdentityN" not in {operation.type for operation in replicas.operations}


@pytest.mark.parametrize("dtype", [tf.float64, tf.float32, tf.float16, tf.bfloat16])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients(graph, dtype, replicas):
    class Sum(tf.keras.layers.Layer):
        def call(self, x):
            return syncbn.resolve().all_reduce_sum(x, "sum")

    def step(layer, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(y * y)
        return y, tape.gradient(loss, x)

    layers = replicas.build(lambda rank: Sum(dtype=dtype.name), (None, 2))
    inputs = [(tf.constant([[rank + 1.0, 2.0]], dtype),) for rank in range(replicas.size)]
    total = np.sum([x.numpy() for (x,) in inputs], axis=0).astype("float64")
    for y, dx in replicas.run(step, layers, inputs, graph=graph).values():
        np.testing.assert_array_equal(y.astype("float64"), total)
        # d/dx of the sum over the replicas of (sum x)^2, which each of them computes.
        np.testing.assert_array_equal(dx.astype("float64"), 2 * replicas.size * total)


def test_the_communicator_knows_its_size_and_rank(replicas, engine):
    def ask(layer, x):
        communicator = syncbn.resolve()
        assert communicator.name == engine
        assert isinstance(communicator, syncbn.Communicator)
        return communicator.size + 0 * x, communicator.rank + 0 * x

    layers = replicas.build(lambda rank: tf.keras.layers.Layer(), (None, 1))
    results = replicas.run(ask, layers, arguments(replicas, 1))
    for rank, (size, own) in results.items():
        assert (size, own) == (replicas.size, rank)


STRAIGHT = [lambda function, x: function(x)]


def looped(function, x):
    return tf.while_loop(lambda i, _: i < 1, lambda i, y: (i + 1, function(y)), (0, x))[1]


def conditional(function, x):
    return tf.cond(tf.reduce_all(x > -1e9), lambda: function(x), lambda: x)


@pytest.mark.parametrize(
    "constructs",
    [
        STRAIGHT,
        [lambda function, x: tf.function(function)(x)],
        # In a function a loop and its gradient have other tensors for a variable than a branch has.
        [looped, conditional],
    ],
    ids=["one function", "nested functions", "loops and branches"],
)
def test_parallel_branches_do_not_mix_their_messages(constructs, replicas):
    if constructs is not STRAIGHT and not replicas.separate:
        pytest.skip("TensorFlow refuses merge_call in functions, branches and loops (tf-keras#301)")
    branches = 6

    class Branches(tf.keras.layers.Layer):
        """Layers with no path between them, whose messages all have one size."""

        def __init__(self):
            super().__init__()
            self.parts = [syncbn.SyncBatchNormalization(momentum=0.0) for _ in range(branches)]

        def build(self, shape):
            for part in self.parts:
                part.build(shape)
            super().build(shape)

    def step(layer, x):
        def branch(part, factor, x):
            return delayed(part, syncbn.resolve().rank)(x * factor + factor)

        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = []
            for number, part in enumerate(layer.parts):
                function = functools.partial(branch, part, number + 1.0)
                construct = constructs[number % len(constructs)]
                outputs.append(construct(function, x))
            loss = tf.add_n([tf.reduce_sum(y**3) for y in outputs])
        return outputs, tape.gradient(loss, x)

    layers = replicas.build(lambda rank: Branches(), (None, 3))
    inputs = arguments(replicas, 4, 3)
    whole = np.concatenate([x.numpy() for (x,) in inputs]).astype("float64")
    truths, dx = [], 0
    for factor in range(1, branches + 1):
        x = whole * factor + factor
        y = oracle.batch_normalization(x, np.zeros_like(x), np.ones(3), np.zeros(3)).y
        truths.append(oracle.batch_normalization(x, 3 * y**2, np.ones(3), np.zeros(3)))
        dx = dx + truths[-1].dx * factor
    for results in replicas.run(step, layers, inputs, graph=True, times=5):
        for rank, (outputs, gradient) in results.items():
            part = slice(4 * rank, 4 * rank + 4)
            for y, truth in zip(outputs, truths, strict=True):
                np.testing.assert_allclose(y, truth.y[part], atol=1e-5)
            np.testing.assert_allclose(gradient, dx[part], atol=1e-4 * np.abs(dx).max())


# (Eagerly a branch that is not taken is not there, and the others would wait.)
@pytest.mark.parametrize(("way", "graph"), [("cond", True), ("weight", True), ("weight", False)])
def test_a_head_that_one_loss_does_not_use_takes_part_in_the_gradient(way, graph, replicas):
    class Heads(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.heads = [syncbn.SyncBatchNormalization(), syncbn.SyncBatchNormalization()]

        def build(self, shape):
            for head in self.heads:
                head.build(shape)
            super().build(shape)

    def step(layer, x, used):
        with tf.GradientTape() as tape:
            tape.watch(x)
            losses = [tf.reduce_sum(head(x, training=True) ** 3) for head in layer.heads]
            if way == "cond":
                loss = tf.cond(used, lambda: losses[0] + losses[1], lambda: losses[0])
            else:
                loss = losses[0] + tf.cast(used, tf.float32) * losses[1]
        return tape.gradient(loss, x)

    layers = replicas.build(lambda rank: Heads(), (None, 3))
    inputs = arguments(replicas, 4, 3)
    last = replicas.size - 1
    inputs = [(x, tf.constant(rank == last)) for rank, (x,) in enumerate(inputs)]
    x = np.concatenate([x.numpy() for x, _ in inputs]).astype("float64")
    y = oracle.batch_normalization(x, np.zeros_like(x), np.ones(3), np.zeros(3)).y
    dy = 3 * y**2
    dx = oracle.batch_normalization(x, dy, np.ones(3), np.zeros(3)).dx
    dy[: 4 * last] = 0
    dx += oracle.batch_normalization(x, dy, np.ones(3), np.zeros(3)).dx
    for rank, own in replicas.run(step, layers, inputs, graph=graph).items():
        np.testing.assert_allclose(own, dx[4 * rank : 4 * rank + 4], atol=1e-5 * np.abs(dx).max())


def test_a_shared_layer_may_be_called_twice_in_a_step(replicas):
    def step(layer, x):
        return layer(x, training=True), layer(3 * x + 1, training=True)

    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(epsilon=0.0), (None, 3))
    for once, twice in replicas.run(step, layers, arguments(replicas, 4, 3), graph=True).values():
        np.testing.assert_allclose(once, twice, atol=1e-5)


def test_collectives_in_a_loop_stay_in_step(replicas):
    if not replicas.separate:
        pytest.skip("TensorFlow refuses merge_call in a loop's body (tf-keras#301)")

    def step(layer, x):
        for _ in tf.range(4):
            x = layer(x, training=True) * 2 + 1
        return x

    layers = replicas.build(lambda rank: syncbn.SyncBatchNormalization(epsilon=0.0), (None, 3))
    inputs = arguments(replicas, 4, 3)
    whole = np.concatenate([x.numpy() for (x,) in inputs]).astype("float64")
    truth = 2 * (whole - whole.mean(0)) / whole.std(0) + 1
    for rank, y in replicas.run(step, layers, inputs, graph=True).items():
        np.testing.assert_allclose(y, truth[4 * rank : 4 * rank + 4], atol=1e-5)
