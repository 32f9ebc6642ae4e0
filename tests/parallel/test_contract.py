"""Replicas behave as one replica with the concatenated batch, on whichever engine."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.contract import check
from tests.drawn_cases import cases, drawn_cases, messages, paired_cases


def numbers(cases):
    """The number of each case, marked where another engine would make no difference to it."""
    sent = messages(2)
    return [
        pytest.param(number, id=str(case), marks=[] if case in sent else pytest.mark.arithmetic)
        for number, case in enumerate(cases)
    ]


@pytest.mark.parametrize("number", numbers(cases(2)))
def test_replicas_behave_as_one_with_the_whole_batch(number, replicas):
    check(replicas, cases(replicas.size)[number])


@pytest.mark.parametrize("number", numbers(paired_cases(2)))
def test_options_hold_alone_and_in_pairs(number, replicas):
    check(replicas, paired_cases(replicas.size)[number])


@pytest.mark.arithmetic
def test_any_case_that_can_be_drawn_holds(replicas):
    failures = []

    # Every rank has to draw the same examples and to run each of them once, or they would wait for
    # each other: nothing is random, shrunk, or repeated because it failed.
    @hypothesis.settings(
        max_examples=15,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(drawn_cases(replicas.size))
    def run(case):
        try:
            check(replicas, case)
        except AssertionError as error:
            failures.append(f"{case}: {error}")

    run()
    assert not failures, "\n".join(failures)


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    ("mean", "spread"), [(1e4, 0.0), (1e3, 10.0)], ids=["large mean", "means far apart"]
)
def test_the_variance_of_the_first_step_is_right_at_large_means(mean, spread, replicas):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(replicas.size, 4, 16, 16, 3)) + mean
    x += spread * np.arange(replicas.size).reshape(-1, 1, 1, 1, 1)
    x = x.astype("float32")

    # Nothing of the initial values is left after a step with momentum 0.
    layers = replicas.build(
        lambda rank: syncbn.SyncBatchNormalization(momentum=0.0), (None, *x.shape[2:])
    )
    arguments = [(tf.constant(x[rank]), None, None) for rank in range(replicas.size)]
    replicas.run(lambda layer, x, *_: layer(x, training=True), layers, arguments)

    truth = x.astype("float64").var((0, 1, 2, 3))
    for variance in replicas.moving(layers)["moving_variance"].values():
        np.testing.assert_allclose(variance, truth, rtol=1e-3)
