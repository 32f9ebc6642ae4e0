"""Outputs and derivatives of every kind of a function that normalizes, and the truth about them.

The truth is the plain mathematics, in float64, on the whole batch in one process, differentiated in
reverse mode only.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import syncbn
from tests.control_flow import CONSTRUCTS, Statistics
from tests.keras import keras

SAMPLES, CHANNELS, EPSILON, MOMENTUM = 4, 3, 1e-3, 0.5
TOLERANCE = 1e-9  # relative to the largest magnitude
_RNG = np.random.default_rng(3)
PARAMETERS = {"gamma": _RNG.normal(1.5, 0.3, CHANNELS), "beta": _RNG.normal(0, 0.3, CHANNELS)}

LAYERS = {
    "SyncBatchNormalization": syncbn.SyncBatchNormalization,
    "SyncCentering": syncbn.SyncCentering,
    "BatchNormalization": keras.layers.BatchNormalization,
}


class Given(NamedTuple):
    """The inputs, weights of a loss, and a tangent: ``(samples, channels)`` each."""

    x: tf.Tensor
    weights: tf.Tensor
    tangent: tf.Tensor


# Each kind returns a dictionary. What ends in "gamma" or "beta" is with respect to a parameter.


def outputs(function, given, parameters):
    return {"y": function(given.x)}


def gradients(function, given, parameters):
    """Also the outputs."""
    with tf.GradientTape() as tape:
        tape.watch(given.x)
        y = function(given.x)
        loss = tf.reduce_sum(given.weights * y * y)
    dx, *shares = tape.gradient(loss, [given.x, *parameters])
    return {"y": y, "dx": dx, **_named("d", shares)}


def second_derivatives(function, given, parameters):
    """Those of a gradient penalty; also the gradients and the outputs."""
    with tf.GradientTape() as tape:
        tape.watch(given.x)
        first = gradients(function, given, parameters)
        penalty = tf.reduce_sum(first["dx"] ** 2)
    dx, *shares = tape.gradient(penalty, [given.x, *parameters])
    return {**first, "second dx": dx, **_named("second d", shares)}


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


def _named(prefix, shares):
    return {prefix + name: share for name, share in zip(PARAMETERS, shares, strict=False)}


class Plain:
    """The mathematics on a whole batch. Each sample has parameters of its own, for their shares."""

    def __init__(self, size, normalizes):
        self.normalizes = normalizes
        self.parameters = [tf.Variable(np.tile(v, (size, 1))) for v in PARAMETERS.values()]
        self.moving = {"moving_mean": np.zeros(CHANNELS), "moving_variance": np.ones(CHANNELS)}

    def __call__(self, x, training=True):
        mean = tf.reduce_mean(x, 0)
        variance = tf.reduce_mean((x - mean) ** 2, 0)
        for name, value in ("moving_mean", mean), ("moving_variance", variance):
            if Statistics.move:
                self.moving[name] = MOMENTUM * self.moving[name] + (1 - MOMENTUM) * value.numpy()
        if not self.normalizes:
            return x - mean
        gamma, beta = self.parameters
        return gamma * (x - mean) / tf.sqrt(variance + EPSILON) + beta

    def derivatives(self, kind, meaning, given):
        """Returns what the kind does."""
        parameters = self.parameters if self.normalizes else []
        function = functools.partial(meaning, self)
        if kind in ("outputs", "gradients", "second derivatives"):
            return KINDS[kind](function, given, parameters)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(given.x)
            y = function(given.x)
            with tf.GradientTape() as linear:
                u = tf.ones_like(y)
                linear.watch(u)
                product = tf.reduce_sum(tape.gradient(y, given.x, u) * given.tangent)
            z = given.weights * y * y if kind == "jacobian" else y
            channels = tf.unstack(tf.reduce_sum(z, 0))
        if kind == "forward mode":  # the product is linear in u
            return {"y": y, "jvp": linear.gradient(product, u)}
        return {"jacobian": tf.stack([tape.gradient(z, given.x) for z in channels], 1)}


@functools.cache
def truth(size, meaning, kind, normalizes):
    """Returns what each of ``size`` replicas must find, and the moving statistics."""
    plain = Plain(size * SAMPLES, normalizes)
    given = Given(*(tf.constant(v.reshape(-1, CHANNELS)) for v in _data(size)))
    whole = plain.derivatives(kind, meaning, given)
    replicas = [{} for _ in range(size)]
    for key, value in whole.items():
        for own, part in zip(replicas, np.split(value.numpy(), size), strict=True):
            own[key] = part.sum(0) if key.endswith(tuple(PARAMETERS)) else part
        if key.startswith("second") and key.endswith(tuple(PARAMETERS)):
            # A second derivative's parts are nobody's own.
            for own in replicas:
                own[key] = value.numpy().sum(0)
    return replicas, plain.moving


def _data(size):
    x, weights, tangent = np.random.default_rng(7).normal(size=(3, size, SAMPLES, CHANNELS))
    return x + np.arange(size)[:, None, None] / 2, weights, tangent


def find(replicas, cell, **options):
    """Returns "right", or what is wrong and by how much, or the error."""
    layer, graph, construct, kind = cell
    normalizes = layer != "SyncCentering"
    layers = replicas.build(
        lambda rank: (
            LAYERS[layer](momentum=MOMENTUM, epsilon=EPSILON, dtype="float64", **options)
            if normalizes
            else LAYERS[layer](momentum=MOMENTUM, dtype="float64", **options)
        ),
        (None, CHANNELS),
    )
    if normalizes:
        for one in layers:
            one.set_weights([*PARAMETERS.values(), *one.get_weights()[2:]])
    arguments = [tuple(map(tf.constant, part)) for part in zip(*_data(replicas.size), strict=True)]
    step = functools.partial(_step, CONSTRUCTS[construct], KINDS[kind])
    try:
        results = replicas.run(step, layers, arguments, graph=graph)
    except Exception as error:
        # `tf.map_fn` and `tf.scan` set this, and leave it behind when their body raises.
        with tf.compat.v1.get_default_graph().as_default():
            tf.compat.v1.get_variable_scope().set_caching_device(None)
        return _message(error)
    expected, moving = truth(replicas.size, CONSTRUCTS[construct].meaning, kind, normalizes)
    wrong = {}
    for rank, result in results.items():
        for key, value in result.items():
            _compare(wrong, key, value, expected[rank][key], [own[key] for own in expected])
    for key, values in replicas.moving(layers).items():
        for value in values.values():
            _compare(wrong, key, value, moving[key], moving[key])
    return "wrong: " + ", ".join(f"{k} {v}" for k, v in wrong.items()) if wrong else "right"


def unlike(replicas, cell, said):
    """Returns what is found in a cell, if that is not what is said of it: a refusal or None."""
    found = find(replicas, cell)
    return found if (found != "right" if said is None else said.sentence not in found) else ""


def _step(construct, kind, layer, *given):
    def call(x, training=True):
        return layer(x, training=training)

    if construct.delayed:
        call = delayed(call, syncbn.resolve().rank)
    found = kind(functools.partial(construct.apply, call), Given(*given), layer.trainable_variables)
    for key, value in found.items():
        if value is None:
            found[key] = tf.fill([], tf.constant(np.nan, tf.float64))
        elif key.startswith("second") and key.endswith(tuple(PARAMETERS)):
            found[key] = syncbn.resolve().all_reduce_sum(value, "test/second")
    return found


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


def _compare(wrong, key, value, expected, whole):
    if value.shape != expected.shape:
        wrong[key] = "None" if value.shape == () else f"of shape {value.shape}"
        return
    error = np.abs(value - expected).max() / np.abs(whole).max()
    if not error <= TOLERANCE:
        wrong[key] = f"{error:.2g}"


def _message(error):
    """Returns the error's text on one line, without the frames that autograph puts before it."""
    text = " ".join(str(error).split())
    if text.startswith("in user code"):
        text = re.split(r" (?=\w+(?:Error|Exception):)", text)[-1]
    else:
        text = f"{type(error).__name__}: {text}"
    if "vectorizing the" in text and error.__cause__ is not None:
        text += " " + _message(error.__cause__)
    return text
