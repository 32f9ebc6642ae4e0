"""Time of a stack of layers, forward and backward, against Keras' own synchronized layer.

usage: python benchmarks/layers.py [--layers 4] [--replicas 2] [--shape 8,56,56,64 ...]

Runs under MirroredStrategy over logical CPU devices. The contestants take turns, step by step, in
one process, so that whatever else the machine does hits them alike; medians and their ratios are
printed. A shape is that of one replica's batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import syncbn

CONTESTANTS: dict[str, Callable[[], tf.keras.layers.Layer]] = {
    "syncbn": syncbn.SyncBatchNormalization,
    "keras synchronized": lambda: tf.keras.layers.BatchNormalization(synchronized=True),
    "keras": tf.keras.layers.BatchNormalization,
}


def make_step(
    strategy: tf.distribute.Strategy, make: Callable, shape: tuple[int, ...], layers: int
) -> Callable[[], None]:
    """Returns a function that runs one forward and backward pass through a stack of layers."""
    with strategy.scope():
        stack = [make() for _ in range(layers)]
        for layer in stack:
            layer.build(shape)
    x = strategy.experimental_distribute_values_from_function(
        lambda context: tf.random.stateless_normal(shape, [1, context.replica_id_in_sync_group])
    )
    dy = strategy.experimental_distribute_values_from_function(
        lambda context: tf.random.stateless_normal(shape, [2, context.replica_id_in_sync_group])
    )

    def replica(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        weights = [weight for layer in stack for weight in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in stack:
                y = layer(y, training=True)
        # The outputs too are returned: else TensorFlow would leave out the last layer's.
        return [y, *tape.gradient(y, [x, *weights], output_gradients=dy)]

    @tf.function
    def step(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        return strategy.run(replica, args=(x, dy))

    return lambda: step(x, dy)


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Returns seconds per step of each contestant, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 5):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if repeat >= 5:  # the first ones trace and warm up
                times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="layers in the stack")
    parser.add_argument("--replicas", type=int, default=2, help="logical CPU devices")
    parser.add_argument("--repeats", type=int, default=60, help="measured steps of each")
    parser.add_argument(
        "--shape",
        nargs="+",
        type=lambda text: tuple(map(int, text.split(","))),
        default=[(8, 56, 56, 64), (4, 28, 28, 256), (2, 7, 7, 512), (16, 64)],
        help="shapes of one replica's batch",
    )
    arguments = parser.parse_args()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * arguments.replicas,
    )
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(arguments.replicas)])
    print(
        f"{arguments.layers} layers, {arguments.replicas} replicas, {os.cpu_count()} cores, ms/step"
    )
    print(f"{'shape':>20} " + " ".join(f"{name:>19}" for name in CONTESTANTS) + "   ours / theirs")
    for shape in arguments.shape:
        steps = {
            name: make_step(strategy, make, shape, arguments.layers)
            for name, make in CONTESTANTS.items()
        }
        times = measure(steps, arguments.repeats)
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        ours = medians["syncbn"]
        ratios = " ".join(f"{ours / medians[name]:5.2f}" for name in list(CONTESTANTS)[1:])
        cells = " ".join(f"{median:19.2f}" for median in medians.values())
        print(f"{shape!s:>20} {cells}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
