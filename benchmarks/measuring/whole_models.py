"""A whole model's training step: the first one, those that follow, and the memory of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import syncbn
from benchmarks import contestants
from benchmarks.cases import Point
from benchmarks.measuring import held_memory, timing
from benchmarks.measuring.job_replicas import JobReplicas

CLASSES = 10

Make = Callable[[tuple[int, ...]], tf.keras.Model]
"""Makes a model for images of a shape, with Keras' plain batch normalizations."""


def resnet_50(shape: tuple[int, ...]) -> tf.keras.Model:
    """Returns ResNet-50 for images of a ``(height, width, channels)``."""
    return tf.keras.applications.ResNet50(weights=None, input_shape=shape, classes=CLASSES)


def small(shape: tuple[int, ...]) -> tf.keras.Model:
    """Returns a model with two normalizations, for a smoke test."""
    layers = tf.keras.layers
    x = inputs = tf.keras.Input(shape)
    for filters in (4, 8):
        x = layers.Conv2D(filters, 3, strides=2, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dense(CLASSES, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    return tf.keras.Model(inputs, x)


def times(
    make: Make,
    replicas: JobReplicas,
    layers: dict[str, str],
    point: Point,
    repeats: int,
) -> dict[str, list[float]]:
    """Returns seconds of first calls and of steps: in a custom loop, and in `fit`.

    A step is forward and backward; in `fit`, which has an optimizer, also the update.

    Args:
        make: Makes the model.
        replicas: The replicas of the job.
        layers: The kind of the normalizations, by contestant.
        point: Has the shape of a replica's images.
        repeats: The number of steps that are counted; a tenth as many first calls.
    """
    samples: dict[str, list[float]] = {}
    first = {name: f"{name}, first call" for name in layers}
    fit = {name: f"{name}, fit" for name in layers}
    steps: dict[str, Callable[[], object]] = {}
    fits: dict[str, Callable[[int], list[float]]] = {}
    for repeat in range(1 + min(3, max(1, repeats // 10))):
        for name, layer in layers.items():
            steps[name] = model_step(replicas, made(make, replicas, layer, point), point)
            fits[name] = fitting(replicas, made(make, replicas, layer, point), point)
            replicas.meet()
            begin = time.perf_counter()
            steps[name]()
            own = time.perf_counter() - begin
            replicas.meet()
            (kerases,) = fits[name](1)
            if repeat:  # the first ones of a process also load kernels
                samples.setdefault(first[name], []).append(own)
                samples.setdefault(f"{fit[name]}, first call", []).append(kerases)
    samples |= timing.alternate(steps, repeats, replicas.meet)
    for _ in range(-(-repeats // 4)):
        for name, run in fits.items():
            replicas.meet()
            # `fit` does other work around its first step.
            samples.setdefault(fit[name], []).extend(run(5)[1:])
    return samples


def peaks(
    make: Make,
    replicas: JobReplicas,
    layers: dict[str, str],
    point: Point,
    repeats: int,
) -> dict[str, list[float]]:
    """Returns the peak growth of the process in a step, in bytes; arguments as for `times`."""
    samples = {}
    for name, layer in layers.items():
        function = model_step(replicas, made(make, replicas, layer, point), point)
        samples[name] = [held_memory.peak(function) for _ in range(min(repeats, 3))]
    return samples


def made(make: Make, replicas: JobReplicas, layer: str, point: Point) -> tf.keras.Model:
    """Returns a model with normalizations of a kind, a key of `contestants.LAYERS`."""
    tf.keras.backend.clear_session()
    with replicas.scope():
        model = make(point.shape[1:])
        if layer == "syncbn":
            syncbn.convert_sync_batchnorm(model)
        elif layer != "keras":
            model = tf.keras.models.clone_model(
                model, clone_function=lambda one: _replaced(one, contestants.LAYERS[layer])
            )
    return model


def model_step(replicas: JobReplicas, model: tf.keras.Model, point: Point) -> Callable[[], object]:
    """Returns a function that runs the model forward and backward on images of its own."""
    (images,) = replicas.normal([point.shape], tf.float32, 1)

    def replica(images: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(images, training=True)))
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    function = tf.function(lambda images: replicas.run(replica, images), autograph=False)
    return lambda: function(images)


def fitting(
    replicas: JobReplicas, model: tf.keras.Model, point: Point
) -> Callable[[int], list[float]]:
    """Returns a function that fits the model for some steps, and returns the seconds of each."""
    local = replicas.strategy.num_replicas_in_sync if replicas.strategy else 1
    shape = (local * point.shape[0], *point.shape[1:])
    images = tf.random.stateless_normal(shape, [1, replicas.rank])
    data = tf.data.Dataset.from_tensors((images, tf.zeros(shape[:1], tf.int32))).repeat()
    with replicas.scope():
        # Not compiled by XLA, which cannot compile what synchronizes.
        loss = "sparse_categorical_crossentropy"
        model.compile("sgd", loss, jit_compile=False)

    def run(steps: int) -> list[float]:
        clock = _Clock()
        model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[clock])
        return clock.seconds

    return run


class _Clock(tf.keras.callbacks.Callback):
    """Takes the seconds of each step of `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _replaced(
    layer: tf.keras.layers.Layer, make: Callable[..., tf.keras.layers.Layer]
) -> tf.keras.layers.Layer:
    """Returns a copy of ``layer``, or, for a plain batch normalization, what ``make`` makes."""
    config = layer.get_config()
    if type(layer) is not tf.keras.layers.BatchNormalization:
        return type(layer).from_config(config)
    options = ("name", "axis", "momentum", "epsilon", "center", "scale")
    return make(**{option: config[option] for option in options})
