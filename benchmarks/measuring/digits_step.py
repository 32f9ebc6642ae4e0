"""A step of `launch/train_digits.py`, from end to end."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from benchmarks.measuring.jobs import ROOT

sys.path.insert(0, str(ROOT / "launch"))


def start_job(engine: str, workers: int) -> Any:
    """Returns the job, as the script starts it."""
    import digits_job

    return digits_job.start_replicas(engine.partition("-")[0], workers)


def digits_steps(
    job: Any, layers: dict[str, str], point: Any, repeats: int
) -> dict[str, list[float]]:
    """Returns the median seconds of a step, for each of a few short trainings that take turns."""
    import digits_data
    import train_digits

    data = digits_data.load_data()
    schedule = train_digits.Schedule(epochs=1, learning_rate=0.02)
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for seed in range(max(1, repeats // 10)):
        for name, layer in layers.items():
            norm = {"syncbn": "sync", "keras": "batch"}[layer]
            setup = train_digits.Setup(norm, job.replicas, point.shape[0])
            with contextlib.redirect_stdout(io.StringIO()):  # Keras' lines
                run = train_digits.train(setup, data, job, schedule, seed)
            samples[name].append(run.step_ms / 1e3)
    return samples
