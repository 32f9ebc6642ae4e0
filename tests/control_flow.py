"""Control flow around a normalization: the constructs, what they mean, and pairs of them.

A construct is a function ``construct(call, x)`` in which ``call`` normalizes. What it means is a
function of the same form without TensorFlow's control flow. Constructs nest, and so do meanings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tests.keras import keras


def body(call, x):
    return x + tf.sin(call(x))


# What constructs mean.


def once(call, x):
    return body(call, x)


def twice(call, x):
    return body(call, body(call, x))


def each(call, x):
    return body(call, x) * body(call, x * x)


def steps(call, x):
    body(call, x)  # Keras calls a cell once more for the first step, to learn what it returns
    return twice(call, x)


# The constructs. Their conditions are tensors that a graph does not know.


def true(x):
    return tf.reduce_all(x > -1e9)


def cond(call, x):
    return tf.cond(true(x), lambda: body(call, x), lambda: x)


def switch_case(call, x):
    index = tf.cast(true(x), tf.int32)
    return tf.switch_case(index, [lambda: x, lambda: body(call, x), lambda: -x])


def case(call, x):
    pairs = [(~true(x), lambda: -x), (true(x), lambda: body(call, x))]
    return tf.case(pairs, default=lambda: x)


def autograph_if(call, x):
    if true(x):  # noqa: SIM108, since autograph leaves expressions as they are
        y = body(call, x)
    else:
        y = x
    return y


def autograph_for(call, x):
    for _ in tf.range(2):
        x = body(call, x)
    return x


def autograph_while(call, x):
    step = tf.zeros([], tf.int32)
    while step < 2:
        x = body(call, x)
        step += 1
    return x


def while_loop(call, x):
    def go_on(step, x):
        return step < 2

    return tf.while_loop(go_on, lambda step, x: (step + 1, body(call, x)), (0, x))[1]


def scan(call, x):
    return tf.scan(lambda x, _: body(call, x), tf.range(2), initializer=x)[-1]


def map_fn(call, x, iterations=1):
    items = tf.stack([x, x * x])
    y = tf.map_fn(lambda item: body(call, item), items, parallel_iterations=iterations)
    return y[0] * y[1]


def parallel_map_fn(call, x):
    # Eagerly TensorFlow has no parallel iterations, and warns.
    return map_fn(call, x, iterations=1 if tf.executing_eagerly() else 2)


def vectorized_map(call, x):
    y = tf.vectorized_map(lambda item: body(call, item), tf.stack([x, x * x]))
    return y[0] * y[1]


def recompute_grad(call, x):
    return tf.recompute_grad(lambda x: body(call, x))(x)


def function(call, x):
    return tf.function(lambda x: body(call, x))(x)


def training_tensor(call, x):
    return body(functools.partial(call, training=true(x)), x)


def rnn(call, x):
    class Cell(keras.layers.Layer):
        """A cell whose state is what it returns."""

        state_size = output_size = x.shape[-1]

        def call(self, inputs, states):
            y = body(call, inputs + states[0])
            return y, [y]

    sequence = tf.stack([x, tf.zeros_like(x)], axis=1)
    return keras.layers.RNN(Cell(dtype=x.dtype.name), dtype=x.dtype.name)(sequence)


class Construct(NamedTuple):
    apply: Callable
    meaning: Callable
    at_once: bool = False
    """Whether the moving statistics move once only, to the first call's: what TensorFlow makes of
    assignments in a vectorized loop, a plain layer's too."""
    delayed: bool = False
    """Whether the replicas come to a call at different times."""

    def around(self, inner: Construct) -> Construct:
        def nest(outer, inner):
            return lambda call, x: outer(functools.partial(inner, call), x)

        return self._replace(
            apply=nest(self.apply, inner.apply),
            meaning=nest(self.meaning, inner.meaning),
            at_once=self.at_once or inner.at_once,
        )


SINGLE = {
    "none": Construct(once, once),
    "tf.cond": Construct(cond, once),
    "tf.switch_case": Construct(switch_case, once),
    "tf.case": Construct(case, once),
    "if": Construct(autograph_if, once),
    "for": Construct(autograph_for, twice),
    "while": Construct(autograph_while, twice),
    "tf.while_loop": Construct(while_loop, twice),
    "tf.scan": Construct(scan, twice),
    "tf.map_fn": Construct(map_fn, each),
    "parallel tf.map_fn": Construct(parallel_map_fn, each),
    "tf.vectorized_map": Construct(vectorized_map, each, at_once=True),
    "tf.recompute_grad": Construct(recompute_grad, once),
    "tf.function": Construct(function, once),
    "training=tensor": Construct(training_tensor, once),
    "RNN": Construct(rnn, steps),
}

NESTED = """
    tf.cond in tf.cond, tf.cond in tf.while_loop, tf.cond in tf.scan, tf.cond in tf.function,
    tf.cond in parallel tf.map_fn, tf.cond in tf.recompute_grad, tf.cond in tf.vectorized_map,
    tf.while_loop in tf.cond, tf.while_loop in tf.while_loop, tf.scan in tf.cond,
    tf.map_fn in tf.function, parallel tf.map_fn in tf.cond, tf.function in tf.function,
    tf.function in tf.cond, tf.function in tf.while_loop, if in for, for in if,
    tf.case in tf.switch_case, training=tensor in tf.cond, training=tensor in tf.while_loop,
    tf.recompute_grad in tf.cond, RNN in tf.function
"""

DELAYED = ["none", "tf.cond", "for", "parallel tf.map_fn", "tf.vectorized_map"]


def _nested(name):
    inner, outer = name.split(" in ")
    return SINGLE[outer].around(SINGLE[inner])


CONSTRUCTS = {
    **SINGLE,
    **{name: _nested(name) for name in " ".join(NESTED.split()).split(", ")},
    **{f"{name}, replicas delayed": SINGLE[name]._replace(delayed=True) for name in DELAYED},
}
