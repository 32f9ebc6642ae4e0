"""Sums come in one order, however long each takes, also in the gradients of branches and loops."""

import functools
import itertools
import random
import time

import numpy as np
import pytest
import tensorflow as tf

from syncbn._src.communicators.order import Order


class Calls:
    """Sums of one process, which note that they are called, at once or a little later."""

    def __init__(self):
        self.made, self._random = [], random.Random(0)  # noqa: S311

    def add_up(self, tensor, name, witness):
        inputs = [tensor] if witness is None else [tensor, witness]
        total = tf.numpy_function(functools.partial(self._call, name), inputs, tensor.dtype)
        return tf.ensure_shape(total, tensor.shape)

    def _call(self, name, value, *witness):
        time.sleep(0.002 * self._random.getrandbits(1))
        self.made.append(name)
        return value


def normalized(calls, order, name):
    """A layer that sums twice, and once in its gradient."""

    def call(x):
        turn = order.turn()

        @tf.custom_gradient
        def function(x):
            sums = [turn.all_reduce_sum(calls.add_up, x, f"{name}{part}") for part in "12"]

            def gradient(upstream):
                return turn.all_reduce_sum(calls.add_up, upstream, f"{name}'") * tf.cos(x)

            return tf.sin(x) + tf.add_n(sums), gradient

        return function(tf.identity(x))

    return call


def looped(call):
    return lambda x: tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, call(y)), (0, x))[1]


def conditional(call):
    return lambda x: tf.cond(tf.reduce_all(x > -1e9), lambda: call(x), lambda: x)


CONSTRUCTS = {
    "plain": lambda call: call,
    "branch": conditional,
    "loop": looped,
    "loop in branch": lambda call: conditional(looped(call)),
    "branch in loop": lambda call: looped(conditional(call)),
    "loop in loop": lambda call: looped(looped(call)),
}


PAIRS = list(itertools.combinations_with_replacement(CONSTRUCTS, 2))


@pytest.mark.parametrize(
    ("names", "around"),
    [
        *itertools.product(PAIRS, ["plain", "loop"]),
        # TensorFlow gives a branch the handle of a plain call and that of others as two tensors.
        *((pair, "gradient in branch") for pair in PAIRS if "plain" not in pair),
    ],
    ids=str,
)
def test_sums_of_two_calls_beside_one_another_have_one_order(names, around):
    calls, order = Calls(), Order()
    first, second = (
        CONSTRUCTS[construct](normalized(calls, order, name))
        for construct, name in zip(names, "ab", strict=True)
    )

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(first(x) * second(2 * x))
        if around == "gradient in branch":
            return tf.cond(y < 1e9, lambda: x - tape.gradient(y, x), lambda: x)
        return x - tape.gradient(y, x)

    function = tf.function(CONSTRUCTS.get(around, lambda call: call)(step))
    orders = set()
    for _ in range(3):
        calls.made = []
        function(tf.constant(np.array([0.3, 0.7])))
        orders.add(tuple(calls.made))
    assert len(orders) == 1
    (made,) = orders
    times = [2 ** construct.count("loop") for construct in names]
    steps = 2 if around == "loop" else 1
    assert [made.count("a'"), made.count("b'")] == [steps * one for one in times]
