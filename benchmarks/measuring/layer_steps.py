"""A training step's batch normalizations, one after another, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from benchmarks import contestants
from benchmarks.cases import Point
from benchmarks.measuring.job_replicas import JobReplicas


def stack_step(replicas: JobReplicas, layer: str, point: Point) -> Callable[[], object]:
    """Returns a function that runs a stack of layers on one input, forward and backward."""
    with replicas.scope():
        layers = [
            contestants.make(layer, point.shape, point.dtype, number)
            for number in range(point.layers)
        ]
    dtype = _dtype(point)
    (x,), (dy,) = (replicas.normal([point.shape], dtype, seed) for seed in (1, 2))

    def replica(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        weights = [weight for layer in layers for weight in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y, training=True)
        # The output too is returned: TensorFlow would prune that of the last layer otherwise.
        return [y, *tape.gradient(y, [x, *weights], output_gradients=dy)]

    function = tf.function(lambda *arguments: replicas.run(replica, *arguments))
    return lambda: function(x, dy)


def resnet_50_shapes(batch: int) -> list[tuple[int, ...]]:
    """Returns the shapes of its 53 normalizations, for images of 224 x 224 pixels."""
    shapes = [(batch, 112, 112, 64)]
    for size, filters, blocks in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        narrow, wide = (batch, size, size, filters), (batch, size, size, 4 * filters)
        shapes += [wide, *[narrow, narrow, wide] * blocks]  # the first one is on the shortcut
    return shapes


def chain_step(replicas: JobReplicas, layer: str, point: Point) -> Callable[[], object]:
    """Returns a function that runs ResNet-50's layers, each on an input of its own shape.

    A tiny part of one number of the layer before is added to the input, and backward to the
    gradient, so that no layer can begin before its neighbour has ended: in the network there would
    be a convolution between.
    """
    shapes = resnet_50_shapes(point.shape[0])
    with replicas.scope():
        layers = [
            contestants.make(layer, shape, point.dtype, number)
            for number, shape in enumerate(shapes)
        ]
    xs, dys = (replicas.normal(shapes, _dtype(point), seed) for seed in (1, 2))

    def replica(xs: list[tf.Tensor], dys: list[tf.Tensor]) -> list[tf.Tensor]:
        tapes, ends = [], []
        before = tf.zeros([1], xs[0].dtype)
        for layer, x in zip(layers, xs, strict=True):
            end = x + _trace_of(before)
            with tf.GradientTape() as tape:
                tape.watch(end)
                before = layer(end, training=True)
            tapes.append(tape)
            ends.append((end, before))
        results = [before]
        after = before
        for layer, tape, (x, y), dy in reversed(list(zip(layers, tapes, ends, dys, strict=True))):
            sources = [x, *layer.trainable_variables]
            after, *gradients = tape.gradient(y, sources, output_gradients=dy + _trace_of(after))
            results += gradients
        return [*results, after]

    function = tf.function(lambda *arguments: replicas.run(replica, *arguments))
    return lambda: function(xs, dys)


def _trace_of(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a tiny multiple of the first number of ``tensor``."""
    return 1e-6 * tf.reshape(tensor, [-1])[0]


def _dtype(point: Point) -> tf.DType:
    return tf.as_dtype(tf.keras.mixed_precision.Policy(point.dtype).compute_dtype)
