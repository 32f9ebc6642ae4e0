"""Checks the layers on a GPU, and measures them there: against the truth, and against peers.

usage: python -m benchmarks.studies.gpu_check [--out FOLDER] [--parts contract layers ...]
           [--torch PYTHON]

From the root of the repository, with one GPU; without one it runs on the CPU, on small inputs, to
show that it runs. What it finds is printed as it comes, then as a table, and written as JSON.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
import tf_keras

import syncbn
from benchmarks.measuring.machine import describe
from tests import kinds_of_replicas as kinds
from tests.contract import Case, check
from tests.drawn_cases import splits

GPU = bool(tf.config.list_physical_devices("GPU"))
KIND = "GPU" if GPU else "CPU"
SHAPES = (
    [(8, 56, 56, 64), (32, 112, 112, 64), (32, 7, 7, 2048), (2, 64, 64, 64, 32)]
    if GPU
    else [(2, 8, 8, 4), (2, 4, 4, 4, 2)]
)
DTYPES = ["float32", "bfloat16", "float16"]
CALLS, ROUNDS = (20, 3) if GPU else (2, 2)
PASSES = 8
"""Over memory: three forward, five backward, when every kernel reads and writes once."""


class Pair:
    """A communicator that behaves as one of two replicas with equal data.

    A layer over it does all that a replica does, except the message.
    """

    name, size, rank, supports_jit = "local", 2, 0, False

    def all_reduce_sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns twice the tensor."""
        return tensor + tensor


# --------------------------------------------------------------------------------------- contract


def contract_cases(size: int) -> list[Case]:
    """Returns a few cases with much in each, since XLA recompiles for every shape."""
    even, ragged, last_empty, _, empty = splits(size)
    center, nan = "SyncCentering", float("nan")
    large = (48, 48, 64)
    return [
        Case(even, steps=2),
        Case(last_empty, steps=2, graph=True),
        Case(empty, graph=True),
        Case(ragged, layer=center, graph=True, steps=2),
        Case(last_empty, masked=True, poison=nan, graph=True),
        Case(ragged, masked=True, poison=nan, layer=center),
        Case(ragged, axis=1, masked=True),
        Case(even, axis=1, sample=(3, 4, 2, 5), graph=True),
        Case(ragged, sample=large, graph=True),
        *(Case(even, sample=large, dtype=dtype, graph=True) for dtype in DTYPES[1:]),
        Case(even, dtype="float64", graph=True),
        Case(even, mean=1e3, spread=10.0, sample=(16, 16, 4)),
        Case(even, mean=1e4, sample=(40, 40, 8), graph=True),
        Case(ragged, options=(("renorm", True),), steps=3),
        Case(ragged, options=(("group_size", 1),), graph=True),
        Case(ragged, options=(("virtual_batch_size", 2),), graph=True),
    ]


def strategy_of(size: int) -> tf.distribute.Strategy:
    """Returns one whose replicas are logical parts of one device, on which it also sums."""
    devices = [f"{KIND}:{number}" for number in range(size)]
    # NCCL refuses two parts of one GPU.
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


def contract_part(report: dict[str, Any]) -> None:
    """Runs the contract's cases, on one replica and two, also under automatic clustering."""
    ways = {"as they are": "", "clustered": "autoclustering"}
    for size in (2, 1):
        replicas = kinds.Strategy(strategy_of(size))
        for way, jit in ways.items():
            passed, failures, begin = 0, [], time.monotonic()
            tf.config.optimizer.set_jit(jit)
            for case in contract_cases(size):
                if jit and not case.graph:
                    continue
                try:
                    check(replicas, case)
                    passed += 1
                except Exception as error:
                    failures.append(f"{case}: {type(error).__name__}: {str(error)[:300]}")
            tf.config.optimizer.set_jit("")
            seconds = time.monotonic() - begin
            said = {"passed": passed, "failures": failures, "seconds": seconds}
            report.setdefault("contract", {})[f"{size} replicas, {way}"] = said
            print(
                f"contract, {size} replicas, {way}: {passed} passed, {len(failures)} failed, "
                f"{seconds:.0f} s",
                *failures,
                sep="\n  ",
                flush=True,
            )


# ----------------------------------------------------------------------------------------- layers


def contestants_on_gpu() -> dict[str, Callable[..., Any]]:
    """Returns functions that make a layer, by name."""
    sync = syncbn.SyncBatchNormalization
    return {
        "syncbn": functools.partial(sync, communicator="local"),
        "syncbn, of two": functools.partial(sync, communicator=Pair()),
        "Keras 3": tf.keras.layers.BatchNormalization,
        "Keras 3 synchronized": functools.partial(
            tf.keras.layers.BatchNormalization, synchronized=True
        ),
        "tf_keras (cuDNN)": tf_keras.layers.BatchNormalization,
    }


def seconds_of(steps: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Returns the median time of a call of each, in two senses.

    ``"called"``: one after another, by the clock; the host prepares the next one meanwhile, and may
    be what takes longer. ``"device"``: of the device's work alone. For that, calls queue up behind
    long work, whose own time is taken off; absent where it did not last until the last call was
    queued.
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    sync = tf.test.experimental.sync_devices

    def seconds(*functions: Callable[[], object]) -> tuple[float, float]:
        begin = time.perf_counter()
        for function in functions:
            function()
        queued = time.perf_counter() - begin
        sync()
        return time.perf_counter() - begin, queued

    for step in steps.values():
        seconds(step, step, step)
    busy = long_work()
    seconds(busy)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            called = seconds(*[step] * CALLS)[0]
            times[name].setdefault("called", []).append(called / CALLS)
            if GPU:
                long = [busy] * (1 + int(1.5 * called / 0.03))
                seconds(*long)  # the clocks of the device rise under load
                alone = seconds(*long)[0]
                both, queued = seconds(*long, *[step] * CALLS)
                if queued < alone:
                    times[name].setdefault("device", []).append((both - alone) / CALLS)
    return {
        name: {sense: statistics.median(values) for sense, values in own.items()}
        for name, own in times.items()
    }


def long_work() -> Callable[[], object]:
    """Returns a function that returns at once, and keeps a GPU busy for 30 ms or more."""
    size = 8192 if GPU else 8
    with tf.device(f"{KIND}:0"):
        factor = tf.random.stateless_normal([size, size], [7, 8])

    @tf.function(autograph=False)
    def multiply(factor: tf.Tensor) -> tf.Tensor:
        with tf.device(f"{KIND}:0"):
            return (factor @ factor) @ factor

    return lambda: multiply(factor)


def layer_step(
    make: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: str,
) -> Callable[[], object]:
    """Returns a layer's forward and backward pass on one input."""
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    with tf.device(f"{KIND}:0"):
        layer = make(dtype=policy)
        layer.build((None, *shape[1:]))
        x, dy = (tf.cast(tf.random.stateless_normal(shape, [1, seed]), dtype) for seed in (1, 2))

    @tf.function
    def step(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.device(f"{KIND}:0"):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return [y, *tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)]

    step(x, dy)
    return lambda: step(x, dy)


def shown(times: dict[str, dict[str, float]]) -> dict[str, str]:
    """Returns microseconds as text."""
    return {
        name: ", ".join(f"{sense} {1e6 * value:.0f}" for sense, value in own.items())
        for name, own in times.items()
    }


def layers(report: dict[str, Any]) -> None:
    """Measures a layer's passes at each shape and dtype."""
    for shape in SHAPES:
        for dtype in DTYPES[: 2 if GPU else 1]:
            steps, failed = {}, {}
            for name, make in contestants_on_gpu().items():
                try:
                    steps[name] = layer_step(make, shape, dtype)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            key = f"{'x'.join(map(str, shape))} {dtype}"
            times = seconds_of(steps)
            report.setdefault("layers", {})[key] = times
            print(key, shown(times), failed, flush=True)
            gc.collect()


# ------------------------------------------------------------------------------------------ model


def model(report: dict[str, Any]) -> None:
    """Measures a training step of ResNet-50: the first one, the others, and the peak of memory."""
    size, batch = (224, 32) if GPU else (32, 2)
    device = f"{KIND}:0"
    images = tf.random.stateless_normal([batch, size, size, 3], [3, 4])
    labels = tf.random.stateless_uniform([batch], [5, 6], maxval=1000, dtype=tf.int32)

    def plain(synchronized: bool = False) -> Any:
        tf.keras.utils.set_random_seed(1)
        made = tf.keras.applications.ResNet50(
            weights=None, input_shape=(size, size, 3), classifier_activation=None
        )
        if not synchronized:
            return made

        def swap(layer: Any) -> Any:
            if not isinstance(layer, tf.keras.layers.BatchNormalization):
                return layer
            return tf.keras.layers.BatchNormalization.from_config(
                {**layer.get_config(), "synchronized": True}
            )

        return tf.keras.models.clone_model(made, clone_function=swap)

    def converted(communicator: Any) -> Any:
        return syncbn.convert_sync_batchnorm(plain(), communicator=communicator)

    makers = {
        "Keras 3": plain,
        "Keras 3 synchronized": lambda: plain(True),
        "syncbn": lambda: converted("local"),
        "syncbn, of two": lambda: converted(Pair()),
    }
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    steps = {}
    for name, make in makers.items():
        with tf.device(device):
            network, optimizer = make(), tf.keras.optimizers.SGD(0.01, 0.9)
            optimizer.build(network.trainable_variables)

        def step(network: Any = network, optimizer: Any = optimizer) -> tf.Tensor:
            with tf.device(device):
                with tf.GradientTape() as tape:
                    value = loss(labels, network(images, training=True))
                variables = network.trainable_variables
                optimizer.apply(tape.gradient(value, variables), variables)
                return value

        function = tf.function(step)
        if GPU:
            tf.config.experimental.reset_memory_stats(device)
        begin = time.perf_counter()
        function()
        tf.test.experimental.sync_devices()
        first = time.perf_counter() - begin
        peak = tf.config.experimental.get_memory_info(device)["peak"] if GPU else 0
        report.setdefault("model", {})[name] = {"first": first, "peak": peak}
        print(f"ResNet-50, {name}: first step {first:.1f} s, peak {peak / 1e9:.2f} GB", flush=True)
        steps[name] = function
    for name, own in seconds_of(steps).items():
        report["model"][name]["step"] = own
        said = ", ".join(f"{sense} {1e3 * value:.1f} ms" for sense, value in own.items())
        print(f"ResNet-50, {name}: {said}", flush=True)


# ----------------------------------------------------------------------------------------- memory


def memory(report: dict[str, Any]) -> None:
    """Measures what four layers hold between the passes, as multiples of their inputs."""
    if not GPU:
        print("memory: TensorFlow counts it on GPUs only", flush=True)
        return
    shape, number, device = (16, 112, 112, 64), 4, "GPU:0"
    for name, make in contestants_on_gpu().items():
        if name == "Keras 3 synchronized":
            continue
        with tf.device(device):
            stack = [make() for _ in range(number)]
            x = tf.random.stateless_normal(shape, [1, 2])
            for layer in stack:
                layer.build((None, *shape[1:]))

            def passes(x: tf.Tensor = x, stack: list[Any] = stack) -> int:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = x
                    for layer in stack:
                        y = layer(y, training=True)
                del y
                gc.collect()
                held = tf.config.experimental.get_memory_info(device)["current"]
                del tape
                return held

            passes()
            gc.collect()
            before = tf.config.experimental.get_memory_info(device)["current"]
            inputs = (passes() - before) / (4 * x.shape.num_elements())
        report.setdefault("memory", {})[name] = inputs
        print(f"memory, {name}: {inputs:.2f} inputs held by {number} layers", flush=True)


# ------------------------------------------------------------------------------------------ torch


def torch(report: dict[str, Any], python: str) -> None:
    """Measures PyTorch's kernels, with another interpreter."""
    script = Path(__file__).with_name("torch_kernels.py")
    shapes = ["x".join(map(str, shape)) for shape in SHAPES]
    command = [python, str(script), "--shapes", *shapes, "--dtypes", *DTYPES[:2]]
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")
    }
    done = subprocess.run(  # noqa: S603  (the user names the interpreter)
        command, capture_output=True, text=True, timeout=120, env=clean
    )
    if done.returncode:
        print("PyTorch:", done.stderr[-1500:], flush=True)
        return
    report["torch"] = json.loads(done.stdout.splitlines()[-1])
    for key, times in report["torch"]["seconds"].items():
        print(
            "PyTorch",
            key,
            {name: f"{1e6 * value:.0f} us" for name, value in times.items()},
            flush=True,
        )


def results_table(report: dict[str, Any]) -> str:
    """Returns the layers' times in microseconds, PyTorch's among them, as Markdown."""
    names = list(contestants_on_gpu())
    lines = [
        f"| microseconds | {' | '.join([*names, 'PyTorch kernels', 'copy x 4'])} |",
        "|---" * (len(names) + 3) + "|",
    ]
    for key, times in report.get("layers", {}).items():
        other = report.get("torch", {}).get("seconds", {}).get(key, {})
        values = [times.get(name, {}).get("device" if GPU else "called") for name in names]
        values += [other.get("all"), PASSES / 2 * other["copy"] if other else None]
        cells = ["" if value is None else f"{1e6 * value:.0f}" for value in values]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS = {"contract": contract_part, "layers": layers, "model": model, "memory": memory}


def main() -> int:
    """Runs the parts that were asked for. Returns 1 if a case of the contract fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "torch"], default=list(PARTS))
    parser.add_argument(
        "--torch", default="python3", metavar="PYTHON", help="a Python that has PyTorch for CUDA"
    )
    parser.add_argument("--memory", type=int, default=24000, help="MB of each half of the GPU")
    given = parser.parse_args()
    device = tf.config.list_physical_devices(KIND)[0]
    half = tf.config.LogicalDeviceConfiguration(memory_limit=given.memory if GPU else None)
    tf.config.set_logical_device_configuration(device, [half] * 2)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    report: dict[str, Any] = {"machine": describe(), "gpu": GPU}
    for name in given.parts:
        begin = time.monotonic()
        if name == "torch":
            torch(report, given.torch)
        else:
            PARTS[name](report)
        print(f"-- {name}: {time.monotonic() - begin:.0f} s", flush=True)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(results_table(report))
    return int(any(one["failures"] for one in report.get("contract", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
