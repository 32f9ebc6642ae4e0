"""Gradient accumulation with the statistics of all micro-batches: what it takes, and what is off.

    python -m benchmarks.studies.accumulated_statistics

A network with normalizations after each of its convolutions gets a batch of the digits in
micro-batches. The gradients of four ways are compared with those of the whole batch at once:

- *micro-batches*: each normalizes for itself, as all frameworks do;
- *one pass first*: the statistics of all micro-batches, from a pass in which each normalizes for
  itself, are constants in a second pass (as `recalibrate` finds them);
- *layer by layer first*: the same, but exact, by a pass for each normalization;
- *layer by layer, both ways*: what the statistics contribute to the gradient comes from all
  micro-batches too, by a backward pass for each normalization. That is exact.
"""

from __future__ import annotations

import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

EPSILON, DEPTH, BATCH, MICRO = 1e-3, 4, 32, (16, 4, 2)


class Network:
    """Convolutions, each with a normalization, in float64."""

    def __init__(self, seed):
        random = tf.random.Generator.from_seed(seed)
        channels = [1, *(8 * 2**block for block in range(DEPTH))]
        self.kernels = [
            tf.Variable(random.normal([3, 3, a, b], 0, (2 / (9 * a)) ** 0.5, tf.float64))
            for a, b in itertools.pairwise(channels)
        ]
        self.head = tf.Variable(random.normal([channels[-1], 10], 0, 0.1, tf.float64))

    @property
    def weights(self):
        return [*self.kernels, self.head]

    def sees(self, number, x):
        """What normalization ``number`` gets, of what the one before returned."""
        x = tf.nn.swish(x) if number else x
        return tf.nn.conv2d(x, self.kernels[number], 2 if number < 3 else 1, "SAME")

    def loss(self, x, labels):
        logits = tf.reduce_mean(tf.nn.swish(x), [1, 2]) @ self.head
        return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)) / BATCH


def mean_and_variance(x):
    return tf.reduce_mean(x, [0, 1, 2]), tf.math.reduce_variance(x, [0, 1, 2])


def normalize(x, mean, variance):
    return (x - mean) / tf.sqrt(variance + EPSILON)


def by_itself(network, x, labels):
    """Gradients of a batch that normalizes for itself, and what its normalizations see."""
    seen = []
    with tf.GradientTape() as tape:
        for number in range(DEPTH):
            x = network.sees(number, x)
            seen.append(x)
            x = normalize(x, *mean_and_variance(x))
        loss = network.loss(x, labels)
    return tape.gradient(loss, network.weights), seen


def with_constants(network, x, labels, statistics):
    with tf.GradientTape() as tape:
        for number, given in enumerate(statistics):
            x = normalize(network.sees(number, x), *given)
        loss = network.loss(x, labels)
    return tape.gradient(loss, network.weights)


def exactly(network, parts):
    """Gradients by passes for each normalization, of micro-batches one at a time."""
    statistics = []
    for number in range(DEPTH):
        seen = []
        for x, _ in parts:
            for before, given in enumerate(statistics):
                x = normalize(network.sees(before, x), *given)
            seen.append(network.sees(number, x))
        statistics.append(mean_and_variance(tf.concat(seen, 0)))
    # Of the statistics, from the last to the first; those behind are known by then.
    gradients = {}
    total = None
    for number in reversed(range(-1, DEPTH)):
        sums = None
        for x, labels in parts:
            with tf.GradientTape() as tape:
                constants = [tuple(map(tf.identity, given)) for given in statistics]
                tape.watch(constants)
                target = 0.0
                for layer, (mean, variance) in enumerate(constants):
                    x = network.sees(layer, x)
                    if layer in gradients:
                        # What moving the statistics of all does, of which these elements are part.
                        share = BATCH / len(labels)
                        true_mean, _ = statistics[layer]
                        own = tf.reduce_mean(x, [0, 1, 2]) / share
                        square = tf.reduce_mean(tf.square(x - true_mean), [0, 1, 2]) / share
                        target += tf.reduce_sum(gradients[layer][0] * own)
                        target += tf.reduce_sum(gradients[layer][1] * square)
                    x = normalize(x, mean, variance)
                target += network.loss(x, labels)
            wanted = network.weights if number < 0 else list(constants[number])
            own = tape.gradient(target, wanted)
            sums = own if sums is None else [a + b for a, b in zip(sums, own, strict=True)]
        if number < 0:
            total = sums
        else:
            gradients[number] = sums
    return total


def difference(found, truth):
    a, b = (np.concatenate([part.numpy().ravel() for part in some]) for some in (found, truth))
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), cosine


def summed(parts):
    return [tf.add_n(list(one)) for one in zip(*parts, strict=True)]


def main():
    images, labels = load_digits(return_X_y=True)
    print("| micro-batch | way | passes | relative difference | cosine |\n|---|---|---|---|---|")
    for micro in MICRO:
        rows = {}
        for seed in range(3):
            network = Network(seed)
            chosen = np.random.default_rng(seed).choice(len(images), BATCH, replace=False)
            x = tf.constant(images[chosen].reshape(-1, 8, 8, 1) / 16)
            y = labels[chosen]
            truth, whole = by_itself(network, x, y)
            parts = [(x[i : i + micro], y[i : i + micro]) for i in range(0, BATCH, micro)]
            alone = [by_itself(network, *part) for part in parts]
            pooled = [
                mean_and_variance(tf.concat(seen, 0))
                for seen in zip(*(s for _, s in alone), strict=True)
            ]
            ways = {
                "micro-batches": ("1 + 1", summed([gradient for gradient, _ in alone])),
                "one pass first": (
                    "2 + 1",
                    summed([with_constants(network, *part, pooled) for part in parts]),
                ),
                "layer by layer first": (
                    f"{DEPTH + 1} + 1",
                    summed(
                        [
                            with_constants(network, *part, map(mean_and_variance, whole))
                            for part in parts
                        ]
                    ),
                ),
                "layer by layer, both ways": (
                    f"{DEPTH + DEPTH + 1} + {DEPTH + 1}",
                    exactly(network, parts),
                ),
            }
            for name, (passes, found) in ways.items():
                rows.setdefault((name, passes), []).append(difference(found, truth))
        for (name, passes), found in rows.items():
            off, cosine = np.mean(found, 0)
            print(
                f"| {micro} of {BATCH} | {name} | {passes} | {off:.2g} | {cosine:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
