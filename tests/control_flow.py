"""Control flow around a normalization: the constructs, what they mean, and pairs of them.

A construct is a function ``construct(call, x)`` in which ``call`` normalizes. What it means is a
function of the same form without TensorFlow's control flow. Constructs nest, and so do meanings.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tests.keras import keras


def body(call, x):
    return x + tf.sin(call(x))


class Statistics:
    """Whether a call moves the moving statistics, which the meaning of constructs says."""

    move = True

    @classmethod
    @contextlib.contextmanager
    def unmoved(cls):
        before, cls.move = cls.move, False
        try:
            yield
        finally:
            cls.move = before


# What constructs mean.


def once(call, x):
    return body(call, x)


def twice(call, x):
    return body(call, body(call, x))


def each(call, x):
    return body(call, x) * body(call, x * x)


def at_once(call, x):
    # The calls of a vectorized loop all start from the same moving statistics, and the first one's
    # stay: what TensorFlow makes of assignments there, a plain layer's too.
    y = body(call, x)
    with Statistics.unmoved():
        return y * body(call, x * x)


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


@functools.cache  # so that equal meanings are one
def _nest(outer, inner):
    return lambda call, x: outer(functools.partial(inner, call), x)


class Construct(NamedTuple):
    apply: Callable
    meaning: Callable
    delayed: bool = False
    """Whether the replicas come to a call at different times."""

    def around(self, inner: Construct) -> Construct:
        return self._replace(
            apply=_nest(self.apply, inner.apply),
            meaning=_nest(self.meaning, inner.meaning),
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
    "tf.vectorized_map": Construct(vectorized_map, at_once),
    "tf.recompute_grad": Construct(recompute_grad, once),
    "tf.function": Construct(function, once),
    "training=tensor": Construct(training_tensor, once),
    "RNN": Construct(rnn, steps),
}

# Constructs of a family are alike; in each family's there is one of each.
FAMILIES = {
    "branches": ("tf.cond", "tf.switch_case", "tf.case", "if"),
    "loops": ("for", "while", "tf.while_loop", "tf.scan"),
    "maps": ("tf.map_fn", "parallel tf.map_fn"),
    "vectorized": ("tf.vectorized_map",),
    "recomputed": ("tf.recompute_grad",),
    "functions": ("tf.function",),
    "cells": ("RNN",),
    "calls": ("none", "training=tensor"),
}

NESTED = """
    tf.cond in tf.cond, tf.case in tf.switch_case, tf.while_loop in tf.cond, tf.scan in tf.cond,
    for in if, parallel tf.map_fn in tf.cond, tf.vectorized_map in if, tf.recompute_grad in tf.cond,
    tf.function in tf.cond, RNN in tf.case, training=tensor in tf.cond,

    tf.cond in tf.while_loop, tf.cond in tf.scan, if in for, tf.switch_case in while,
    tf.while_loop in tf.while_loop, tf.map_fn in while, tf.vectorized_map in for,
    tf.recompute_grad in tf.scan, tf.function in tf.while_loop, RNN in for,
    training=tensor in tf.while_loop,

    tf.cond in parallel tf.map_fn, while in tf.map_fn, parallel tf.map_fn in parallel tf.map_fn,
    tf.vectorized_map in tf.map_fn, tf.recompute_grad in parallel tf.map_fn,
    tf.function in parallel tf.map_fn, RNN in tf.map_fn, training=tensor in tf.map_fn,

    tf.cond in tf.vectorized_map, for in tf.vectorized_map, tf.map_fn in tf.vectorized_map,
    tf.vectorized_map in tf.vectorized_map, tf.recompute_grad in tf.vectorized_map,
    tf.function in tf.vectorized_map, RNN in tf.vectorized_map,
    training=tensor in tf.vectorized_map,

    tf.cond in tf.recompute_grad, tf.while_loop in tf.recompute_grad,
    tf.map_fn in tf.recompute_grad, tf.vectorized_map in tf.recompute_grad,
    tf.recompute_grad in tf.recompute_grad, tf.function in tf.recompute_grad,
    RNN in tf.recompute_grad, training=tensor in tf.recompute_grad,

    tf.cond in tf.function, tf.scan in tf.function, tf.map_fn in tf.function,
    tf.vectorized_map in tf.function, tf.recompute_grad in tf.function,
    tf.function in tf.function, RNN in tf.function, training=tensor in tf.function,

    tf.cond in RNN, tf.while_loop in RNN, parallel tf.map_fn in RNN, tf.vectorized_map in RNN,
    tf.recompute_grad in RNN, tf.function in RNN, RNN in RNN, training=tensor in RNN
"""

DELAYED = ["none", "tf.cond", "for", "parallel tf.map_fn", "tf.vectorized_map"]


def _nested(name):
    inner, outer = name.split(" in ")
    return SINGLE[outer].around(SINGLE[inner])


CONSTRUCTS = {
    **SINGLE,
    **{f"{name}, replicas delayed": SINGLE[name]._replace(delayed=True) for name in DELAYED},
    **{name: _nested(name) for name in " ".join(NESTED.split()).split(", ")},
}
