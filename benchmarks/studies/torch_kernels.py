"""Times what PyTorch's SyncBatchNorm runs on a GPU, without its collectives, and a copy.

usage: python benchmarks/studies/torch_kernels.py [--shapes 32x112x112x64 ...]
           [--dtypes float32 ...]

Prints JSON: for each shape and dtype the median seconds of the four kernels together, of each, and
of a copy of the same bytes, device to device. It needs PyTorch for CUDA, and nothing of syncbn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch

CALLS, ROUNDS = 20, 7


def median_seconds(function: Callable[[], object]) -> float:
    """Returns the median over rounds of the time of a call, by the device's own clock."""
    for _ in range(5):
        function()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(times)


def measure_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Returns seconds, for channels in the last axis, as they lie in memory."""
    x, dy = (torch.randn(shape, device="cuda").to(dtype).movedim(-1, 1) for _ in range(2))
    channels, count = shape[-1], torch.full([1], x.numel() / shape[-1], device="cuda")
    gamma, beta = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    mean, inverse = torch.batch_norm_stats(x, 1e-3)
    sums = torch.batch_norm_backward_reduce(dy, x, mean, inverse, gamma, True, True, True)

    def backward_elemt() -> object:
        return torch.batch_norm_backward_elemt(
            dy, x, mean, inverse, gamma, sums[0], sums[1], count.to(torch.int32)
        )

    target = torch.empty_like(x)
    kernels = {
        "moments": lambda: torch.batch_norm_stats(x, 1e-3),
        "normalize": lambda: torch.batch_norm_elemt(x, gamma, beta, mean, inverse, 1e-3),
        "gradient sums": lambda: torch.batch_norm_backward_reduce(
            dy, x, mean, inverse, gamma, True, True, True
        ),
        "input gradient": backward_elemt,
        "copy": lambda: target.copy_(x),
    }
    times = {name: median_seconds(kernel) for name, kernel in kernels.items()}
    pieces = [kernel for name, kernel in kernels.items() if name != "copy"]
    return {"all": median_seconds(lambda: [piece() for piece in pieces]), **times}


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["8x56x56x64"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    given = parser.parse_args()
    measured = {
        f"{shape} {dtype}": measure_kernels(
            tuple(map(int, shape.split("x"))), getattr(torch, dtype)
        )
        for shape in given.shapes
        for dtype in given.dtypes
    }
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "torch": torch.__version__, "seconds": measured}))


if __name__ == "__main__":
    main()
