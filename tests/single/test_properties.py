"""The contract on drawn cases, with threads for replicas and a communicator of a user's making."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import syncbn
from tests.cases import RENORM, cases, drawn_cases
from tests.contract import Case, check
from tests.keras import KERAS_3
from tests.replicas import Threads

TWO_AXES = {"axis": (1, 3), "sample": (2, 3, 4)}


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_case_that_can_be_drawn_holds(data):
    size = data.draw(st.integers(1, 4))
    check(Threads(size), data.draw(drawn_cases(size)))


@pytest.mark.parametrize("case", cases(4), ids=str)
def test_a_communicator_can_be_any_object(case):
    check(Threads(4), case)


@pytest.mark.parametrize(
    "case",
    [
        Case((3,), steps=2),
        Case((0,)),
        Case((3,), mean=1e4),  # where the kernel's own moments are too rough
        Case((3,), dtype="bfloat16"),
        Case((3,), options=(("center", False), ("unbiased_moving_variance", True))),
        Case((3,), options=RENORM),
        Case((3,), masked=True, poison=float("nan")),
    ],
    ids=str,
)
def test_one_replica_alone_with_a_large_input(case):
    check(Threads(1), dataclasses.replace(case, sample=(48, 48, 64)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", ["SyncBatchNormalization", "SyncCentering"])
def test_several_axes(layer, masked):
    if layer == "SyncBatchNormalization" and KERAS_3:
        with pytest.raises(TypeError, match="Keras 3 normalizes one axis"):
            syncbn.SyncBatchNormalization(axis=(1, 3))
        return
    check(Threads(2), Case((2, 3), layer=layer, masked=masked, **TWO_AXES))


def test_payloads_are_of_the_order_of_the_channels_whatever_the_mask():
    replicas = Threads(1)
    made = []

    class Recording(syncbn.LocalCommunicator):
        def __init__(self):
            self.payloads = []
            made.append(self)

        def all_reduce_sum(self, tensor, name):
            self.payloads.append(tensor.shape.num_elements())
            return tensor

    for axis, expected in ((-1, [2 * 6 + 1, 2 * 6]), (1, [3 * 5, 2 * 5])):
        check(replicas, Case((4,), axis=axis, masked=True), communicator=Recording())
        assert made[-1].payloads == expected


def test_a_failing_case_is_noticed():
    class Deaf(syncbn.LocalCommunicator):
        """Tells nobody anything: every replica normalizes with its own statistics."""

    with pytest.raises(AssertionError, match="is off by"):
        check(Threads(2), Case((2, 3)), communicator=Deaf())


def test_nan_and_inf_that_are_not_masked_stay_visible():
    layer = syncbn.SyncBatchNormalization()
    y = layer(np.float32([[1, 1], [np.nan, 2], [3, np.inf]]), training=True)
    assert not np.isfinite(y.numpy()).all(0).any()
