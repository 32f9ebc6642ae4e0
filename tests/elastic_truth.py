"""Training in a job whose size changes, in float64 on the concatenated batch of each step."""

import numpy as np

from tests import oracle

MOMENTUM, RATE = 0.9, 0.02


def batch(step, rank):
    """The samples of a worker in a step, ``(4, 3)`` and ``(4, 1)``."""
    rng = np.random.default_rng([step, rank])
    x = rng.normal(rank, 1 + rank, size=(4, 3)).astype("float32")
    return x, (x.sum(1, keepdims=True) + rng.normal(size=(4, 1))).astype("float32")


def trained(variables, sizes):
    """The variables after a step with each of ``sizes`` workers: two dense layers, one norm."""
    v = {name: value.astype("float64") for name, value in variables.items()}
    velocities = dict.fromkeys(("kernel", "gamma", "beta", "last_kernel", "last_bias"), 0.0)
    for step, size in enumerate(sizes):
        parts = [batch(step, rank) for rank in range(size)]
        x, y = (np.concatenate(one).astype("float64") for one in zip(*parts, strict=True))
        h = x @ v["kernel"]
        normalized = oracle.batch_normalization(h, np.zeros_like(h), v["gamma"], v["beta"]).y
        error = 2 * (normalized @ v["last_kernel"] + v["last_bias"] - y) / len(x)
        dy = error @ v["last_kernel"].T
        result = oracle.batch_normalization(h, dy, v["gamma"], v["beta"])
        gradients = {
            "kernel": x.T @ result.dx,
            "gamma": result.dgamma,
            "beta": result.dbeta,
            "last_kernel": normalized.T @ error,
            "last_bias": error.sum(0),
        }
        for name, gradient in gradients.items():
            velocities[name] = MOMENTUM * velocities[name] - RATE * gradient
            v[name] = v[name] + velocities[name]
        v["moving_mean"] += 0.1 * (result.mean - v["moving_mean"])
        v["moving_variance"] += 0.1 * (result.variance - v["moving_variance"])
    return v
