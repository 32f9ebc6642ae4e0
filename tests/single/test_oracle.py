"""The oracle itself: its gradients are those of its outputs."""

import numpy as np
import pytest

from tests import oracle


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [-1, 1, (1, 3)])
def test_gradients_are_central_differences(axis, masked):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 2, 4, 2))
    mask = rng.random((3, 2, 4)) < 0.7 if masked else None
    channels = np.prod([x.shape[a] for a in np.atleast_1d(axis)])
    gamma, beta = rng.normal(size=(2, channels))

    def loss(x, gamma, beta):
        y = oracle.batch_normalization(x, dy, gamma, beta, axis=axis, mask=mask).y
        return np.sum(y * dy)

    def central_centering(x):
        return np.sum(oracle.centering(x, dy, axis=axis, mask=mask).y * dy)

    truth = oracle.batch_normalization(x, dy, gamma, beta, axis=axis, mask=mask)
    np.testing.assert_allclose(truth.dx, _differences(lambda v: loss(v, gamma, beta), x), atol=1e-6)
    np.testing.assert_allclose(
        truth.dgamma, _differences(lambda v: loss(x, v, beta), gamma), atol=1e-6
    )
    np.testing.assert_allclose(
        truth.dbeta, _differences(lambda v: loss(x, gamma, v), beta), atol=1e-6
    )
    centered = oracle.centering(x, dy, axis=axis, mask=mask)
    np.testing.assert_allclose(centered.dx, _differences(central_centering, x), atol=1e-6)


def _differences(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient
