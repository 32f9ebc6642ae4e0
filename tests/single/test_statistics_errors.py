"""The errors that are predicted for the statistics of a group, against those of many groups."""

import numpy as np
import pytest

from syncbn._src.models.statistics_errors import (
    ReplicaMoments,
    batch_distribution,
    statistics_error,
)
from tests import oracle


def moments(batches):
    """Of ``(batches, elements, channels)``, which have all the same number of elements."""
    count = np.full((len(batches), batches.shape[-1]), float(batches.shape[1]))
    return ReplicaMoments(count, batches.mean(1), batches.var(1))


def images(number, pixels, resemblance, seed, draw="normal"):
    """Batches of two images, whose pixels resemble each other, with a large mean."""
    rng = np.random.default_rng(seed)
    shared, own = (getattr(rng, draw)(size=(number, 2, size, 16)) for size in (1, pixels))
    x = np.sqrt(resemblance) * shared + np.sqrt(1 - resemblance) * own
    return (3 * x + 100).reshape(number, 2 * pixels, 16)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
@pytest.mark.parametrize(("pixels", "resemblance"), [(1, 1.0), (4, 0.5), (49, 0.3), (49, 0.0)])
def test_the_error_of_a_group_is_predicted_from_single_replicas(pixels, resemblance, draw):
    seen = batch_distribution(moments(images(200, pixels, resemblance, 1, draw)))
    many = images(4000, pixels, resemblance, 2, draw)
    mean, variance = many.mean((0, 1)), many.reshape(-1, 16).var(0)
    for group in 1, 2, 8:
        batches = many.reshape(len(many) // group, -1, 16)
        found = statistics_error(seen, group, 1e-3)
        expected = oracle.measured_errors(batches, mean, variance, 1e-3)
        np.testing.assert_allclose(found[1:], expected, rtol=0.2)


def test_independent_elements_are_counted():
    assert batch_distribution(moments(images(500, 1, 1.0, 3))).independent == pytest.approx(2, 0.1)
    # Of 49 pixels that have nothing in common each is one; of those that are alike all are one.
    found = batch_distribution(moments(images(500, 49, 0.0, 3))).independent
    assert found == pytest.approx(98, rel=0.1)
    assert batch_distribution(moments(images(500, 49, 1.0, 3))).independent == pytest.approx(2, 0.1)


def test_a_channel_that_never_changes_has_no_error():
    batches = np.ones((8, 4, 3)) * [1.0, 2.0, 1e6]
    found = statistics_error(batch_distribution(moments(batches)), 1, 0.0)
    assert found[1:] == (0, 0, 0)
