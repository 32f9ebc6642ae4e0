"""How much memory a stack of layers holds between forward and backward."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks import contestants
from benchmarks.cases import Point
from benchmarks.measuring import layer_steps
from benchmarks.measuring.job_replicas import JobReplicas


def held(
    replicas: JobReplicas, layers: dict[str, str], point: Point, repeats: int
) -> dict[str, list[float]]:
    """Returns the growth of the process, with all of its replicas, in bytes.

    After the forward pass alone, eagerly: what remains is what the tape holds, each layer's input
    and what else the layer keeps. And the peak, within a step in a graph. The input of the first
    layer is there before and does not count.

    Raises:
        RuntimeError: the process's size does not show what TensorFlow allocates.
    """
    _require_that_allocations_show(point)
    samples: dict[str, list[float]] = {}
    for name, layer in layers.items():
        times = range(min(repeats, 3))
        samples[name] = [_grown(replicas, layer, point) for _ in times]
        step = layer_steps.stack_step(replicas, layer, point)
        samples[f"{name}, peak of a graph"] = [peak(step) for _ in times]
    return samples


def _grown(replicas: JobReplicas, layer: str, point: Point) -> float:
    with replicas.scope():
        stack = [
            contestants.make(layer, point.shape, point.dtype, number)
            for number in range(point.layers)
        ]
    (x,) = replicas.normal([point.shape], tf.float32, 1)
    sizes: list[int] = []

    def replica(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in stack:
                y = layer(y, training=True)
        # Called once, when all replicas have got here.
        tf.distribute.get_replica_context().merge_call(lambda strategy: sizes.append(_resident()))
        return tf.reduce_sum(tape.gradient(y, x))

    replicas.run(replica, x)  # one-time allocations are not the layers'
    before = _resident()
    replicas.run(replica, x)
    return sizes[-1] - before


def peak(step: Callable[[], object]) -> float:
    """Returns the peak growth of the process, in bytes, while ``step`` runs for the second time.

    The job's environment has to be that which `jobs` has for measuring memory.
    """
    step()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) - before


def _resident() -> int:
    """Returns how many bytes of this process are in memory, without what is free for reuse."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _require_that_allocations_show(point: Point) -> None:
    before = _resident()
    tensors = [tf.random.normal(point.shape) for _ in range(point.layers)]
    allocated = 4 * int(np.prod(point.shape)) * len(tensors)
    grown = _resident() - before
    del tensors
    left = _resident() - before
    if abs(grown - allocated) > 0.1 * allocated or left > 0.1 * allocated:
        raise RuntimeError(
            "The size of the process must show what TensorFlow allocates. Received: "
            f"{grown / 1e6:.0f} MB more for {allocated / 1e6:.0f} MB, {left / 1e6:.0f} MB after."
        )
