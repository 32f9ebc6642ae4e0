"""The contract as a function: W replicas behave as one replica with the concatenated batch.

A `Case` says what is drawn, `check` runs it on replicas of any kind and compares every replica's
part with the oracle's.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import tensorflow as tf

import syncbn
from tests import oracle
from tests.truth import Truth

# Relative to the largest magnitude. The 16-bit types round outputs and gradients to 11 and 8 bits.
TOLERANCE = {"float64": 1e-11, "float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    split: tuple[int, ...]
    """The batch size of each replica."""
    sample: tuple[int, ...] = (5, 4, 6)
    """The shape of a sample."""
    layer: str = "SyncBatchNormalization"
    axis: Any = -1
    dtype: str = "float32"
    masked: bool = False
    unmasked: tuple[int, ...] = ()
    """The replicas whose call has no mask, though the others' have."""
    poison: float | None = None
    """What stands in the masked elements, such as NaN."""
    mean: float = 0.0
    spread: float = 0.0
    """How far apart the means of the replicas are."""
    graph: bool = False
    steps: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    tiny: bool = False
    """Whether dx may be what is left when two nearly equal terms cancel, as with two samples: then
    the tolerance is relative to the terms."""

    def __str__(self) -> str:
        default = Case(self.split)
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return "-".join(["+".join(map(str, self.split)), *changed]).replace(" ", "")

    @property
    def parts(self) -> list[slice]:
        """Where the samples of each replica are in the whole batch."""
        return [slice(a, b) for a, b in itertools.pairwise(np.cumsum([0, *self.split]))]

    @property
    def policy(self) -> Any:
        return f"mixed_{self.dtype}" if self.dtype in ("float16", "bfloat16") else self.dtype


def check(replicas, case: Case, communicator: Any = None) -> None:
    """Runs ``case`` on ``replicas`` and compares with the oracle."""
    assert len(case.split) == replicas.size, "the case is for another number of replicas"
    rng = np.random.default_rng(case.seed)
    normalizes = case.layer == "SyncBatchNormalization"
    options = {"axis": case.axis, "momentum": 0.9, "dtype": case.policy, **dict(case.options)}
    layers = replicas.build(
        lambda rank: getattr(syncbn, case.layer)(
            communicator=replicas.communicator(rank) if communicator is None else communicator,
            **options,
        ),
        (None, *case.sample),
    )
    gamma, beta = _set_parameters(layers, options, rng) if normalizes else (None, None)
    count = int(np.prod(layers[0].moving_mean.shape))
    truth = Truth(normalizes, count, case.axis, options)

    def step(layer, x, dy, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)

    for _ in range(case.steps):
        x, dy, mask = _drawn(case, rng)
        masks = [None if mask is None else mask[part] for part in case.parts]
        if replicas.separate:  # a strategy's replicas share one call, which has a mask or has none
            masks = [None if rank in case.unmasked else m for rank, m in enumerate(masks)]
        arguments = [
            (tf.constant(x[part]), tf.constant(dy[part]), own)
            for part, own in zip(case.parts, masks, strict=True)
        ]
        results = replicas.run(step, layers, arguments, graph=case.graph)
        x64, dy64 = x.astype("float64"), dy.astype("float64")
        y, dx, dx_terms, normalized = truth.step(x64, dy64, gamma, beta, mask, case.split)
        shares = _shares(dy64, normalized, case)
        names = [n for n, o in (("dgamma", "scale"), ("dbeta", "center")) if options.get(o, True)]
        for rank, (own_y, (own_dx, *parameters)) in results.items():
            part = case.parts[rank]
            assert own_y.shape == x[part].shape
            _close(own_y, y[part], y, case, f"y of replica {rank}", mask, part)
            magnitude = dx_terms if case.tiny and normalizes else dx
            _close(own_dx, dx[part], magnitude, case, f"dx of replica {rank}", mask, part)
            for name, gradient in zip(names if normalizes else [], parameters, strict=True):
                own, whole = shares[name][rank], np.stack(shares[name])
                _close(gradient.reshape(-1), own, whole, case, f"{name} of replica {rank}")
    _compare_statistics(replicas, case, layers, truth)


def _set_parameters(layers, options, rng):
    """Gives gamma and beta to the layers, and returns what they multiply with and add."""
    channels = layers[0].moving_mean.shape
    gamma, beta = rng.normal(size=(2, *channels)) if channels else (1.0, 0.0)
    gamma, beta = np.float32(gamma + 2), np.float32(beta)
    scale, center = options.get("scale", True), options.get("center", True)
    use = [weight for weight, on in ((gamma, scale), (beta, center)) if on]
    for layer in layers:
        layer.set_weights([*use, *layer.get_weights()[len(use) :]])
    return gamma if scale else np.ones_like(gamma), beta if center else np.zeros_like(beta)


def _drawn(case, rng):
    """Draws x, dy and the mask, if there is one, of the whole batch."""
    x = rng.normal(size=(sum(case.split), *case.sample)) + case.mean
    for rank, part in enumerate(case.parts):
        x[part] += rank * case.spread
    dtype = tf.as_dtype(case.dtype)
    x = tf.cast(x, dtype).numpy()
    dy = tf.cast(rng.normal(size=x.shape), dtype).numpy()
    if not case.masked:
        return x, dy, None
    mask = rng.random(x.shape[:-1]) < 0.6
    for rank in case.unmasked:
        mask[case.parts[rank]] = True
    if case.poison is not None:
        x[~mask] = case.poison
        dy[~mask] = 0
    return x, dy, mask


def _compare_statistics(replicas, case, layers, truth):
    # 16-bit inputs are exact for the statistics, which are float32.
    dtype = "float64" if case.dtype == "float64" else "float32"
    for name, values in replicas.moving(layers).items():
        expected = truth.moving[name]
        for rank, value in values.items():
            tolerance = TOLERANCE[dtype] + _rounding(case, dtype)
            _near(value.reshape(-1), expected, expected, tolerance, f"{name} of replica {rank}")
            # Bit for bit: the sum over all replicas is this one's value so many times, exactly.
            total = replicas.total(value.astype("float64"))
            assert np.array_equal(total, replicas.size * value.astype("float64")), f"{name} differs"


def _rounding(case, dtype):
    """How much a mean is rounded in the dtype of the statistics, in standard deviations."""
    return abs(case.mean) * TOLERANCE[dtype] / 50


def _shares(dy, normalized, case):
    """Each replica's own part of the parameter gradients."""
    reduced = oracle.reduced_axes(dy, case.axis)
    product = oracle.contribution(dy, normalized)
    return {
        "dgamma": [product[part].sum(reduced).reshape(-1) for part in case.parts],
        "dbeta": [dy[part].sum(reduced).reshape(-1) for part in case.parts],
    }


def _close(actual, expected, whole, case, what, mask=None, part=None):
    if case.poison is not None and mask is not None:
        # What is put in under a mask comes out there, and nowhere else.
        actual, expected = actual[mask[part]], expected[mask[part]]
        whole = whole[mask]
    tolerance = TOLERANCE[case.dtype] + _rounding(case, case.dtype)
    _near(actual, expected, whole, tolerance, what)


def _near(actual, expected, whole, tolerance, what):
    actual = np.asarray(actual, "float64")
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert np.isfinite(actual).all(), f"{what} is not finite"
    scale = max(np.abs(whole).max(initial=0), 1e-30)
    error = np.abs(actual - expected).max(initial=0) / scale
    assert error <= tolerance, f"{what} is off by {error:.2e} of its largest magnitude {scale:.3g}"
