"""The pure functions: moments, their wire format, and the kernels."""

import numpy as np
import pytest
import tensorflow as tf

from syncbn._src.ops import kernels, training_kernels
from syncbn._src.ops.channels import normalized_axes
from syncbn._src.ops.moments import local_sums, not_negative, pack, unpack


def moments_of(x, axes):
    sums = local_sums(x, axes)
    return unpack(pack(sums), sums)


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (1000,), (1_000_000,), (10, 100_000), (2, 64, 64, 64)], ids=str
)
@pytest.mark.parametrize("mean", [0.0, 1e4, -1e6])
def test_local_moments_keep_their_digits_at_any_mean_and_size(mean, shape):
    x = np.random.default_rng(0).normal(mean, 1, size=(*shape, 4)).astype("float32")
    truth = x.astype("float64").reshape(-1, 4)
    moments = moments_of(tf.constant(x), (len(shape),))
    assert moments.count.numpy() == [len(truth)]
    spacing = np.spacing(np.float32(max(abs(mean), 1)))
    np.testing.assert_allclose(moments.mean, truth.mean(0), atol=spacing)
    np.testing.assert_allclose(
        moments.variance, truth.var(0), rtol=2e-5, atol=max(spacing**2, 1e-10)
    )


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1000, 4, 1000), (1,)),
        ((16, 4, 128, 256), (1,)),
        ((100_000, 4, 3), (1,)),
        ((100_000, 2, 2), (1, 2)),
        ((300, 2, 1000, 2), (1, 3)),
    ],
    ids=str,
)
def test_local_moments_keep_their_digits_wherever_the_channels_are(shape, axes):
    x = np.random.default_rng(0).normal(1e4, 1, size=shape).astype("float32")
    reduced = tuple(a for a in range(len(shape)) if a not in axes)
    moments = moments_of(tf.constant(x), axes)
    truth = x.astype("float64")
    np.testing.assert_allclose(moments.mean, truth.mean(reduced).reshape(-1), atol=1e-3)
    np.testing.assert_allclose(moments.variance, truth.var(reduced).reshape(-1), rtol=2e-5)


def test_a_jump_in_the_data_does_not_spoil_the_variance():
    # A pivot taken from the first elements would be 1e4 standard deviations off here.
    x = np.random.default_rng(0).normal(1e4, 1, size=(50_000, 2)).astype("float32")
    x[:3] = 0
    variance = moments_of(tf.constant(x), (1,)).variance
    np.testing.assert_allclose(variance, x.astype("float64").var(0), rtol=1e-5)


def test_packed_moments_of_parts_add_up_to_those_of_the_whole():
    rng = np.random.default_rng(0)
    x = rng.normal(1e5, 1, size=(40, 3)) + np.arange(40)[:, None]
    parts = [x[:0], x[:1], x[1:7], x[7:]]
    sums = [local_sums(tf.constant(part), (1,)) for part in parts]
    packed = sum(map(pack, sums))
    assert packed.dtype == tf.float64
    assert packed.shape == (2 * 3 + 1,)
    whole = unpack(packed, sums[0])
    assert whole.count.numpy() == [40]
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.variance, x.var(0), rtol=1e-6)


def test_nothing_has_moments_zero():
    for part in moments_of(tf.zeros([0, 5, 3]), (2,)):
        np.testing.assert_array_equal(part, np.zeros(part.shape))


@pytest.mark.parametrize("channels", [1, 3, 64, 1001])  # the last of them not in whole packets
def test_a_nan_stays_visible_in_a_variance(channels):
    for function in (not_negative, tf.function(not_negative)):
        assert np.isnan(function(tf.fill([channels], tf.constant(np.nan, tf.float64)))).all()
        assert (function(tf.fill([channels], tf.constant(-1e-9, tf.float64))).numpy() == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 700])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16], ids=lambda d: d.name)
@pytest.mark.parametrize("chosen", [(False, False), (True, False), (True, True)], ids=str)
def test_all_kernels_give_the_same_answer(chosen, dtype, rows):
    rng = np.random.default_rng(0)
    x, dy = (tf.cast(rng.normal(3, 2, size=(rows, 2, 8)), dtype) for _ in range(2))
    mean, scale, offset = (tf.constant(v, tf.float32) for v in rng.normal(size=(3, 8)))
    axes, chosen = (2,), kernels.Kernels(*chosen)
    rtol = {"float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype.name]
    rounding = {"rtol": rtol, "atol": 1e-5}
    wide_dy, wide_x = (part.numpy().astype("float64") for part in (dy, x))
    centered = wide_x - mean.numpy()
    y = kernels.scale_and_offset(x, mean, scale, offset, axes, chosen.fused)
    assert y.dtype == dtype
    truth = centered * scale.numpy() + offset.numpy()
    np.testing.assert_allclose(y.numpy().astype("float64"), truth, **rounding)

    first, second, scaled = kernels.gradient_sums(dy, x, mean, scale, axes, chosen)
    np.testing.assert_allclose(first, wide_dy.sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(second, (wide_dy * centered).sum((0, 1)), rtol=1e-4)

    def gradient():
        vectors = mean, scale, scaled, offset, 2.0 * offset
        return kernels.input_gradient(dy, x, *vectors, axes, chosen)

    dx = tf.function(gradient)()
    assert dx.dtype == dtype
    truth = wide_dy * scale.numpy() - (centered * offset.numpy() + 2 * offset.numpy())
    np.testing.assert_allclose(dx.numpy().astype("float64"), truth, **rounding)


@pytest.mark.parametrize("rows", [1, 700])
def test_the_kernels_of_one_replica_alone_give_what_differentiation_does(rows):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, size=(2, rows, 2, 8))
    scale, offset = rng.normal(size=(2, 8))
    with tf.GradientTape() as tape:
        sources = [tf.constant(value) for value in (x, scale, offset)]
        tape.watch(sources)
        wide_x, wide_scale, wide_offset = sources
        mean, variance = tf.nn.moments(wide_x, [0, 1])
        y = (wide_x - mean) / tf.sqrt(variance + 1e-3) * wide_scale + wide_offset
    gradients = tape.gradient(y, sources, dy)

    x, dy, scale, offset = (tf.constant(value, tf.float32) for value in (x, dy, scale, offset))
    ours = training_kernels.normalize_single_replica(x, scale, offset, 1e-3, (2,))
    for one, truth in zip(ours, (y, mean, variance), strict=True):
        np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-5)
    ours = kernels.fused_gradient(dy, x, scale, *ours[1:], 1e-3, (2,), training=True)
    for one, truth in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(one, truth, atol=5e-5 * np.abs(truth).max())


def test_fused_kernels_are_chosen_for_large_channels_last_inputs_only(monkeypatch):
    def chosen(shape, axes, dtype=tf.float32, **options):
        return kernels.choose_kernels(tf.TensorSpec(shape, dtype), axes, **options).fused

    assert chosen([8, 56, 56, 64], (3,))
    # A single replica's passes are one kernel each from fewer elements on.
    assert [chosen([32, 7, 7, 64], (3,), at_once=alone) for alone in (False, True)] == [False, True]
    assert not chosen([2, 7, 7, 512], (3,), at_once=True)
    assert chosen([None, 56, 56, 64], (3,))
    assert not chosen([2, 7, 7, 512], (3,))
    assert not chosen([8, 64, 56, 56], (1,))
    assert not chosen([8, 56, 56, 64], (3,), tf.float64)
    # So many rows that float32 sums lose digits.
    assert not chosen([2, 64, 64, 64, 32], (4,))
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [kind])
    assert not chosen([8, 56, 56, 64], (3,))


def test_xla_compiles_in_functions_for_known_shapes_only():
    def compiled():
        shapes = (8, 56, 56, 64), (None, 56, 56, 64), (2, 7, 7, 512)
        return [
            kernels.choose_kernels(tf.TensorSpec(shape), (3,)).compiled_gradient for shape in shapes
        ]

    assert compiled() == [False, False, False]
    with tf.Graph().as_default():  # of a session
        assert compiled() == [False, False, False]
    traced = []
    tf.function(lambda: traced.extend(compiled()))()
    assert traced == [True, False, False]


@pytest.mark.parametrize(
    ("axis", "shape", "expected"),
    [(-1, (None, 3), (1,)), (1, (2, 3, 4), (1,)), ((3, -3), (2, 3, 4, 5), (1, 3))],
)
def test_axes_are_sorted_and_counted_from_the_front(axis, shape, expected):
    assert normalized_axes(axis, shape) == expected
