"""The contract on drawn cases, with threads for replicas and a user-defined communicator."""

import dataclasses

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import syncbn
from tests.contract import Case, check
from tests.drawn_cases import RENORM, cases, drawn_cases
from tests.keras import KERAS_3
from tests.kinds_of_replicas import Threads

TWO_AXES = {"axis": (1, 3), "sample": (2, 3, 4)}


@hypothesis.settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is no fault
)
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


class Twins(syncbn.LocalCommunicator):
    """Two replicas with the same batch each: statistics and gradients are those of one."""

    size = 2

    def all_reduce_sum(self, tensor, name):
        return 2.0 * tensor


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_what_xla_compiles_is_right_under_masks_and_in_branches(branch, masked, dtype):
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(value) for value in rng.normal(size=(2, 3, 48, 48, 64)))
    mask = tf.constant(rng.random(x.shape[:-1]) < 0.6) if masked else None

    def gradients(dtype, training):
        layer = syncbn.SyncBatchNormalization(communicator=Twins(), dtype=dtype)
        layer.build(x.shape)
        own = tf.cast(x, layer.compute_dtype)

        def step(own, training):
            with tf.GradientTape() as tape:
                tape.watch(own)
                y = layer(own, training=training, mask=mask)
            sources = [own, *layer.trainable_variables]
            return tape.gradient(y, sources, output_gradients=tf.cast(dy, y.dtype))

        if dtype == "float64":
            return step(own, training)
        return tf.function(step)(own, training)

    truth = gradients("float64", True)
    results = gradients(dtype, tf.constant(True) if branch else True)
    rough = {"float32": 1e-5, "mixed_bfloat16": 1e-2, "mixed_float16": 2e-3}[dtype]
    for one, other in zip(results, truth, strict=True):
        magnitude = np.abs(other).max()
        np.testing.assert_allclose(tf.cast(one, tf.float64), other, atol=rough * magnitude)


@pytest.mark.parametrize("training", [True, "tensor"])
@pytest.mark.parametrize("deviation", [1e-14, 1.0, 1e13])
def test_deviations_of_any_magnitude(deviation, training):
    x, dy = np.random.default_rng(0).normal(size=(2, 2, 48, 48, 64))
    layer = syncbn.SyncBatchNormalization(communicator=Twins(), epsilon=0.0)
    layer.build(x.shape)

    @tf.function
    def step(x, dy, training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return tape.gradient(y, x, output_gradients=dy)

    wide = tf.constant(deviation * x)
    with tf.GradientTape() as tape:
        tape.watch(wide)
        mean = tf.reduce_mean(wide, [0, 1, 2])
        centered = wide - mean
        y = centered / tf.sqrt(tf.reduce_mean(tf.square(centered), [0, 1, 2]))
    truth = deviation * tape.gradient(y, wide, output_gradients=tf.constant(dy)).numpy()
    narrow = (tf.constant(value, tf.float32) for value in (deviation * x, dy))
    dx = step(*narrow, True if training is True else tf.constant(True))
    dx = deviation * dx.numpy().astype("float64")
    np.testing.assert_allclose(dx, truth, atol=1e-5 * np.abs(truth).max())


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
