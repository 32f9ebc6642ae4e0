"""Time of the fused and the plain kernels: where `kernels.fused_is_faster` draws its line.

usage: python benchmarks/kernels.py [--repeats 40]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from syncbn.ops import kernels, moments

SHAPES = [
    (16, 64),
    (98, 512),
    (392, 512),
    (392, 1024),
    (3136, 256),
    (25088, 64),
    (100352, 64),
]


def variants(shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Returns each kernel on inputs of ``shape``, fused and plain."""
    x, dy = (tf.random.stateless_normal(shape, [1, seed]) for seed in (1, 2))
    vector = tf.random.stateless_normal(shape[1:], [1, 3])
    count = tf.constant(shape[0], tf.float64)
    axes = (1,)
    functions: dict[str, Callable[[], object]] = {}
    for fused, name in ((True, "fused"), (False, "plain")):
        functions[f"normalize {name}"] = lambda fused=fused: kernels.scale_and_offset(
            x, vector, vector, vector, axes, fused
        )
        functions[f"gradient {name}"] = lambda fused=fused: kernels.gradient_terms(
            dy, x, vector, vector, axes, fused
        )
    functions["moments fused"] = lambda: kernels.rough_moments(x, axes)
    functions["moments plain"] = lambda: moments.two_pass_moments(x, count, axes, None)
    return {name: tf.function(function) for name, function in functions.items()}


def main() -> None:
    """Prints a line for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40, help="measured calls of each")
    repeats = parser.parse_args().repeats
    print(f"microseconds, fused / plain, {os.cpu_count()} cores, TensorFlow {tf.__version__}")
    print(
        f"{'shape':>14} {'elements':>9} {'moments':>15} {'normalize':>15} {'gradient':>15}  fused?"
    )
    for shape in SHAPES:
        functions = variants(shape)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for repeat in range(repeats + 3):
            for name, function in functions.items():
                begin = time.perf_counter()
                function()
                if repeat >= 3:
                    times[name].append(time.perf_counter() - begin)
        cells = []
        for kernel in ("moments", "normalize", "gradient"):
            pair = (statistics.median(times[f"{kernel} {kind}"]) for kind in ("fused", "plain"))
            cells.append("{:6.0f} / {:6.0f}".format(*(1e6 * value for value in pair)))
        chosen = kernels.fused_is_faster(tf.TensorSpec(shape), (1,))
        print(f"{shape!s:>14} {shape[0] * shape[1]:9} {'  '.join(cells)}  {chosen}", flush=True)


if __name__ == "__main__":
    main()
