"""Control flow around a normalization, and what is asked of it: outputs and derivatives of all kinds.

A construct is a function ``construct(call, x)``, where ``call`` normalizes; what it means is a
function of the same form in plain Python, without control flow of TensorFlow. Constructs nest, and
so do their meanings, so truth is the meaning's value for plain mathematics on the whole batch.

Conditions are tensors that a graph does not know.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import NamedTuple

import numpy as np
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
    body(call, x)  # Keras calls a cell once more for the first step, to learn its outputs' shape
    return twice(call, x)


def true(x):
    return tf.reduce_all(x > -1e9)


# The constructs.


def none(call, x):
    return body(call, x)


def cond(call, x):
    return tf.cond(true(x), lambda: body(call, x), lambda: x)


def switch_case(call, x):
    index = tf.cast(true(x), tf.int32)
    return tf.switch_case(index, [lambda: x, lambda: body(call, x), lambda: -x])


def case(call, x):
    pairs = [(~true(x), lambda: -x), (true(x), lambda: body(call, x))]
    return tf.case(pairs, default=lambda: x)


def autograph_if(call, x):
    if true(x):
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


def map_fn_in_parallel(call, x):
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
        """A cell whose state is the sum of its steps."""

        state_size = output_size = x.shape[-1]

        def call(self, inputs, states):
            y = body(call, inputs + states[0])
            return y, [y]

    # The second step adds nothing to the first one's state.
    steps = tf.stack([x, tf.zeros_like(x)], axis=1)
    return keras.layers.RNN(Cell(dtype=x.dtype.name), dtype=x.dtype.name)(steps)


class Construct(NamedTuple):
    apply: object
    meaning: object

    def around(self, inner):
        """Nests ``inner`` in this one."""

        def nest(outer, inner):
            return lambda call, x: outer(functools.partial(inner, call), x)

        return Construct(nest(self.apply, inner.apply), nest(self.meaning, inner.meaning))


SINGLE = {
    "none": Construct(none, once),
    "cond": Construct(cond, once),
    "switch_case": Construct(switch_case, once),
    "case": Construct(case, once),
    "if": Construct(autograph_if, once),
    "for": Construct(autograph_for, twice),
    "while": Construct(autograph_while, twice),
    "while_loop": Construct(while_loop, twice),
    "scan": Construct(scan, twice),
    "map_fn": Construct(map_fn, each),
    "map_fn in parallel": Construct(map_fn_in_parallel, each),
    "vectorized_map": Construct(vectorized_map, each),
    "recompute_grad": Construct(recompute_grad, once),
    "function": Construct(function, once),
    "training tensor": Construct(training_tensor, once),
    "rnn": Construct(rnn, steps),
}

# The inner first, as one says "cond in while_loop".
NESTED = [
    ("cond", "cond"),
    ("cond", "while_loop"),
    ("while_loop", "cond"),
    ("while_loop", "while_loop"),
    ("scan", "cond"),
    ("cond", "scan"),
    ("map_fn", "function"),
    ("map_fn in parallel", "cond"),
    ("cond", "map_fn in parallel"),
    ("function", "function"),
    ("function", "cond"),
    ("function", "while_loop"),
    ("cond", "function"),
    ("if", "for"),
    ("for", "if"),
    ("case", "switch_case"),
    ("training tensor", "cond"),
    ("training tensor", "while_loop"),
    ("rnn", "function"),
    ("recompute_grad", "cond"),
    ("cond", "recompute_grad"),
    ("cond", "vectorized_map"),
]

CONSTRUCTS = {
    **SINGLE,
    **{f"{inner} in {outer}": SINGLE[outer].around(SINGLE[inner]) for inner, outer in NESTED},
}


# In these the ranks come to an iteration at different times.
DELAYED = ["none", "cond", "for", "map_fn in parallel", "vectorized_map"]
CONSTRUCTS |= {f"{name}, delayed": SINGLE[name] for name in DELAYED}


def delayed(call, rank):
    """Returns ``call`` with every second of its passes, forward and backward, late on a rank."""
    passes = itertools.count(rank)

    def wait():
        time.sleep(0.02 * (next(passes) % 2))
        return np.int32(0)

    @tf.custom_gradient
    def late(x):
        with tf.control_dependencies([tf.numpy_function(wait, [], tf.int32)]):
            return tf.identity(x), late

    return lambda x, training=True: late(call(late(x), training=training))


# What is asked. Each returns a dictionary, of which "d..." are with respect to the parameters.


class Given(NamedTuple):
    """The inputs, the weights of a loss, and a tangent: ``(batch, channels)`` each."""

    x: tf.Tensor
    weights: tf.Tensor
    tangent: tf.Tensor


def outputs(function, given, parameters):
    return {"y": function(given.x)}


def gradients(function, given, parameters):
    with tf.GradientTape() as tape:
        tape.watch(given.x)
        y = function(given.x)
        loss = tf.reduce_sum(given.weights * y * y)
    dx, *shares = tape.gradient(loss, [given.x, *parameters])
    return {"y": y, "dx": dx, **_named(shares)}


def second_derivatives(function, given, parameters):
    """Those of a gradient penalty."""
    with tf.GradientTape() as outer:
        outer.watch(given.x)
        with tf.GradientTape() as inner:
            inner.watch(given.x)
            y = function(given.x)
            loss = tf.reduce_sum(given.weights * y * y)
        penalty = tf.reduce_sum(inner.gradient(loss, given.x) ** 2)
    dx, *shares = outer.gradient(penalty, [given.x, *parameters])
    return {"dx": dx, **_named(shares)}


def forward_mode(function, given, parameters):
    with tf.autodiff.ForwardAccumulator(given.x, given.tangent) as accumulator:
        y = function(given.x)
    return {"y": y, "jvp": accumulator.jvp(y)}


def jacobian(function, given, parameters):
    with tf.GradientTape() as tape:
        tape.watch(given.x)
        y = function(given.x)
        z = tf.reduce_sum(given.weights * y * y, 0)
    return {"jacobian": tf.transpose(tape.jacobian(z, given.x), [1, 0, 2])}


def batch_jacobian(function, given, parameters):
    with tf.GradientTape() as tape:
        tape.watch(given.x)
        y = function(given.x)
    return {"jacobian": tape.batch_jacobian(y, given.x)}


KINDS = {
    "outputs": outputs,
    "gradients": gradients,
    "second derivatives": second_derivatives,
    "forward mode": forward_mode,
    "jacobian": jacobian,
    "batch_jacobian": batch_jacobian,
}


def _named(shares):
    return dict(zip(("dgamma", "dbeta"), shares, strict=False))


# The truth.

EPSILON, MOMENTUM = 1e-3, 0.5


class Plain:
    """The mathematics on the whole batch, with parameters that each sample has of its own."""

    def __init__(self, gamma, beta, size, normalizes):
        self.normalizes = normalizes
        self.parameters = [tf.Variable(np.tile(v, (size, 1))) for v in (gamma, beta)]
        self.moving = {"moving_mean": np.zeros(gamma.shape), "moving_variance": np.ones(beta.shape)}

    def __call__(self, x, training=True):
        mean = tf.reduce_mean(x, 0)
        variance = tf.reduce_mean((x - mean) ** 2, 0)
        for name, value in ("moving_mean", mean), ("moving_variance", variance):
            self.moving[name] = MOMENTUM * self.moving[name] + (1 - MOMENTUM) * value.numpy()
        if not self.normalizes:
            return x - mean
        gamma, beta = self.parameters
        return gamma * (x - mean) / tf.sqrt(variance + EPSILON) + beta

    def derivatives(self, kind, meaning, given):
        """Returns what `KINDS` do, and the moving statistics, by reverse mode only."""
        parameters = self.parameters if self.normalizes else []
        function = functools.partial(meaning, self)
        if kind in ("outputs", "gradients", "second derivatives"):
            return KINDS[kind](function, given, parameters)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(given.x)
            y = function(given.x)
            if kind == "forward mode":
                # dx is linear in u: its derivative with respect to u is the jvp.
                with tf.GradientTape() as linear:
                    u = tf.ones_like(y)
                    linear.watch(u)
                    product = tf.reduce_sum(tape.gradient(y, given.x, u) * given.tangent)
                return {"y": y, "jvp": linear.gradient(product, u)}
            z = given.weights * y * y if kind == "jacobian" else y
            sums = tf.unstack(tf.reduce_sum(z, 0))
        rows = [tape.gradient(channel, given.x) for channel in sums]
        return {"jacobian": tf.stack(rows, 1)}
