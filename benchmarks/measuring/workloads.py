"""What the processes of a job do at one point of a case, by name."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from benchmarks.cases import Point
from benchmarks.measuring import digits_step, held_memory, layer_steps, timing, whole_models
from benchmarks.measuring.job_replicas import JobReplicas

Samples = dict[str, list[float]]
"""Seconds or bytes, by contestant."""


class Workload(NamedTuple):
    """How the processes join, and what they measure at one point."""

    measure: Callable[[Any, dict[str, str], Point, int], Samples]
    """Takes the replicas, contestants with their layers, the point, and how often."""
    join: Callable[[str, int], Any] = JobReplicas
    """Takes the engine and the number of workers; what it returns has a ``rank``."""


def measured_steps(
    make: Callable[[JobReplicas, str, Point], Callable[[], object]],
    replicas: JobReplicas,
    layers: dict[str, str],
    point: Point,
    repeats: int,
) -> Samples:
    """Measures the steps that ``make`` returns for each of the layers."""
    made = {name: make(replicas, layer, point) for name, layer in layers.items()}
    return timing.alternate(made, repeats, replicas.meet)


def trace(replicas: JobReplicas, layers: dict[str, str], point: Point, repeats: int) -> Samples:
    """Measures the first call of a function, which traces it, with layers that are built."""
    samples: Samples = {name: [] for name in layers}
    for repeat in range(1 + min(repeats, 5)):
        for name, layer in layers.items():
            function = layer_steps.stack_step(replicas, layer, point)
            replicas.meet()
            begin = time.perf_counter()
            function()
            if repeat:  # the first one of a process also loads kernels
                samples[name].append(time.perf_counter() - begin)
    return samples


def latency(replicas: JobReplicas, layers: dict[str, str], point: Point, repeats: int) -> Samples:
    """Measures what synchronization over MPI adds to a layer, and what its messages take alone.

    A layer sends two messages. A message is an all-reduce, from a `tf.numpy_function`.
    """
    from mpi4py import MPI

    calls = 100
    payload = np.ones(2 * point.shape[-1] + 1)
    total = np.empty_like(payload)

    def all_reduce() -> None:
        for _ in range(calls):
            MPI.COMM_WORLD.Allreduce(payload, total)

    @tf.function
    def numpy_function(value: tf.Tensor) -> tf.Tensor:
        for _ in range(calls):  # unrolled; each waits for the one before
            value = tf.numpy_function(lambda array: array, [value], tf.float64)
        return value

    tensor = tf.constant(payload)
    functions = {
        **{name: layer_steps.stack_step(replicas, layer, point) for name, layer in layers.items()},
        "all-reduce": all_reduce,
        "numpy_function": lambda: numpy_function(tensor),
    }
    times = timing.alternate(functions, repeats, replicas.meet)
    number = {**dict.fromkeys(layers, point.layers), "all-reduce": calls, "numpy_function": calls}
    each = {name: [value / number[name] for value in values] for name, values in times.items()}
    ours, local = (each[name] for name in layers)
    return {
        **each,
        "added by synchronization": [a - b for a, b in zip(ours, local, strict=True)],
        "2 x (all-reduce + numpy_function)": [
            2 * (a + b) for a, b in zip(each["all-reduce"], each["numpy_function"], strict=True)
        ],
    }


WORKLOADS = {
    "stack": Workload(functools.partial(measured_steps, layer_steps.stack_step)),
    "chain": Workload(functools.partial(measured_steps, layer_steps.chain_step)),
    "trace": Workload(trace),
    "latency": Workload(latency),
    "memory": Workload(held_memory.held),
    "digits": Workload(digits_step.digits_steps, digits_step.start_job),
    "resnet50": Workload(functools.partial(whole_models.times, whole_models.resnet_50)),
    "resnet50-memory": Workload(functools.partial(whole_models.peaks, whole_models.resnet_50)),
    "small-model": Workload(functools.partial(whole_models.times, whole_models.small)),
}
