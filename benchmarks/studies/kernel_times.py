"""Time of every kernel in every variant, for the thresholds of `kernels.choose_kernels`.

usage: python -m benchmarks.studies.kernel_times [--repeats 40] [--dtype float32]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from benchmarks.measuring import timing
from syncbn._src.ops import kernels, moments, training_kernels
from syncbn._src.ops.kernels import PLAIN, Kernels

SHAPES = [
    (16, 64),
    (98, 512),
    (392, 512),
    (392, 1024),
    (3136, 256),
    (25088, 64),
    (100352, 64),
]
FUSED, COMPILED = Kernels(True, False), Kernels(True, True)


def variants(shape: tuple[int, int], dtype: str) -> dict[str, list[Callable[[], object]]]:
    """Returns, by what they do, functions on inputs of ``shape``: plain, fused, compiled.

    Compiled is what XLA makes of the plain one; GPUs run that.
    """
    x, dy = (tf.cast(tf.random.stateless_normal(shape, [1, seed]), dtype) for seed in (1, 2))
    vector = tf.random.stateless_normal(shape[1:], [1, 3])
    count = tf.constant(shape[0], tf.float64)
    axes = (1,)

    def normalize(chosen: Kernels) -> object:
        return kernels.scale_and_offset(x, vector, vector, vector, axes, chosen.fused)

    def sums(chosen: Kernels) -> object:
        return kernels.gradient_sums(dy, x, vector, vector, axes, chosen)[:2]

    def gradient(chosen: Kernels) -> object:
        scaled = tf.cast(dy, tf.float32)  # another kernel has made it
        return kernels.input_gradient(dy, x, *[vector] * 2, scaled, *[vector] * 2, axes, chosen)

    def compiled(function: Callable[[], object]) -> Callable[[], object]:
        return tf.function(function, jit_compile=True, autograph=False)

    def exact() -> object:
        return moments.exact_sums(x, count, axes, None)

    def one_replica() -> object:
        return training_kernels.normalize_single_replica(x, vector, vector, 1e-3, axes)

    def one_replica_gradient() -> object:
        vectors = vector, vector, tf.square(vector)
        return kernels.fused_gradient(dy, x, *vectors, 1e-3, axes, training=True)

    return {
        "moments": [exact, lambda: training_kernels.rough_moments(x, axes), compiled(exact)],
        "normalize": [
            lambda: normalize(PLAIN),
            lambda: normalize(FUSED),
            compiled(lambda: normalize(PLAIN)),
        ],
        "gradient sums": [
            lambda: sums(PLAIN),
            lambda: sums(FUSED),
            compiled(lambda: sums(PLAIN)),
        ],
        "input gradient": [
            lambda: gradient(PLAIN),
            lambda: gradient(FUSED),
            lambda: gradient(COMPILED),
        ],
        "alone, forward": [one_replica],
        "alone, backward": [one_replica_gradient],
    }


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Returns the median time of each in microseconds, minus that of an empty function."""
    compiled = [tf.function(function, autograph=False) for function in functions]
    compiled.append(tf.function(lambda: tf.constant(0.0), autograph=False))
    times = timing.alternate({str(n): one for n, one in enumerate(compiled)}, repeats)
    *values, nothing = (1e6 * statistics.median(own) for own in times.values())
    return [value - nothing for value in values]


def main() -> None:
    """Prints a line for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40, help="measured calls of each")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="the inputs'"
    )
    given = parser.parse_args()
    if tf.config.get_visible_devices("GPU"):
        sys.exit("The clock is read when a call returns: hide GPUs, with CUDA_VISIBLE_DEVICES=")
    print(f"Microseconds, {given.dtype}, TensorFlow {tf.__version__}; plain / fused / compiled.\n")
    names = list(variants((1, 1), "float32"))
    print(f"| rows, channels | chosen | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for shape in SHAPES:
        chosen = kernels.choose_kernels(tf.TensorSpec(shape), (1,)).fused
        cells = [
            " / ".join(f"{value:.0f}" for value in medians(functions, given.repeats))
            for functions in variants(shape, given.dtype).values()
        ]
        print(f"| {shape} | {'fused' if chosen else 'plain'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
