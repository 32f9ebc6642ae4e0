"""Digits: large means, many rows, and operations that a compiler computes in its own way."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.ops import channels, kernels, moments, virtual, xla
from tests import oracle, processes
from tests.keras import KERAS_3

AXES = (1,)
MAKERS = [syncbn.SyncBatchNormalization, syncbn.SyncCentering]


def outputs_and_gradients(layer, x, dy, **options):
    @tf.function(**options)
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, dy)

    return step(tf.constant(x), tf.constant(dy))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "XLA"])
@pytest.mark.parametrize("rows", [48, 700, 4096])  # the last for the fused kernels
@pytest.mark.parametrize(("mean", "tolerance"), [(1e4, 2e-6), (1e6, 1e-3)])
@pytest.mark.parametrize("make", MAKERS)
def test_a_large_mean_is_subtracted_to_the_last_digit(make, mean, tolerance, rows, compiled):
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, size=(rows, 64)).astype("float32")
    dy = rng.normal(size=x.shape).astype("float32")
    wide, wide_dy = x.astype("float64"), dy.astype("float64")
    if make is syncbn.SyncCentering:
        # Nothing but the mean is taken off, and there float32 has all digits.
        y, dx, tolerance = wide - wide.mean(0), wide_dy - wide_dy.mean(0), 1e-6
    else:
        truth = oracle.batch_normalization(wide, wide_dy, np.ones(64), np.zeros(64))
        y, dx = truth.y, truth.dx
    ours = outputs_and_gradients(make(), x, dy, jit_compile=compiled)
    np.testing.assert_allclose(ours[0], y, atol=tolerance)
    np.testing.assert_allclose(ours[1], dx, atol=tolerance)


def test_sums_of_squares_may_be_too_large_for_float32():
    x = 1e18 * np.random.default_rng(0).normal(size=(2048, 64)).astype("float32")
    layer = syncbn.SyncBatchNormalization(momentum=0.0)
    y, _ = outputs_and_gradients(layer, x, np.ones_like(x))
    wide = x.astype("float64")
    np.testing.assert_allclose(y, (wide - wide.mean(0)) / wide.std(0), atol=2e-6)
    np.testing.assert_allclose(layer.moving_variance, wide.var(0), rtol=2e-6)


@pytest.mark.parametrize(("rows", "mean"), [(2048, 60.0), (4096, 30.0)])
def test_xla_takes_no_moments_from_a_kernel_that_it_computes_another_way(rows, mean):
    x = np.random.default_rng(0).normal(mean, 1, size=(rows, 64)).astype("float32")
    layer = syncbn.SyncBatchNormalization(momentum=0.0)
    outputs_and_gradients(layer, x, np.ones_like(x), jit_compile=True)
    np.testing.assert_allclose(layer.moving_variance, x.astype("float64").var(0), rtol=2e-6)


def test_a_function_traced_for_tensorflows_kernels_is_not_compiled():
    layer = syncbn.SyncBatchNormalization()
    x = tf.random.stateless_normal([4096, 64], [1, 2], mean=30.0)
    inner = tf.function(lambda x: layer(x, training=True))
    inner(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not_for_xla"):
        tf.function(inner, jit_compile=True)(x)


def test_automatic_clustering_computes_what_is_computed_without():
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"
    finished = processes.run([("python", processes.program("clustered"), {"TF_XLA_FLAGS": flags})])
    assert finished.code == 0, finished.output


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_sums_over_more_rows_than_float32_bears(known, monkeypatch):
    # Fewer rows will do, where the limit is lower.
    monkeypatch.setattr(kernels, "MOST_FUSED_ROWS", 1 << 12)
    kernels._gradient_sums.cache_clear()
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 1 << 18, 1)).astype("float32") + 3
    with tf.GradientTape() as tape:
        layer = syncbn.SyncBatchNormalization(epsilon=1e-6)
        layer.build((None, 1))
        signature = [tf.TensorSpec([len(x) if known else None, 1])]
        y = tf.function(lambda x: layer(x, training=True), input_signature=signature)(x)
    dgamma, dbeta = tape.gradient(y, layer.trainable_variables, dy)
    wide = x.astype("float64")
    normalized = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-6)
    np.testing.assert_allclose(dbeta, dy.astype("float64").sum(0), rtol=2e-7)
    np.testing.assert_allclose(dgamma, (dy * normalized).sum(0), rtol=1e-4)
    kernels._gradient_sums.cache_clear()


def test_counts_and_indices_beyond_32_bits():
    # Tensors with so many elements, but for an axis that has none.
    assert moments.count_elements(tf.zeros([1 << 17, 1 << 17, 0]), (2,)).numpy() == [1 << 34]
    rows = (1 << 33) + 65
    assert channels._sum_rows(tf.zeros([rows, 0]), 0, None).shape == [0]
    assert moments.count_elements(tf.zeros([rows, 0]), AXES).numpy() == [rows]
    x = tf.zeros([0, 1 << 17, 1 << 17, 3])
    assert virtual._sample_counts(x, (3,), None).shape == [0, 1]
    x = tf.zeros([2, 1 << 17, 1 << 17, 0])
    np.testing.assert_array_equal(virtual._sample_counts(x, (3,), None), [[1 << 34]] * 2)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(6, 5), (64, 48, 64)], ids=["plain", "fused"])
@pytest.mark.parametrize("make", MAKERS)
def test_forward_mode_differentiates_as_finite_differences_do(make, shape, graph):
    rng = np.random.default_rng(0)
    layer = make(dtype="float32")
    layer.build((None, *shape[1:]))
    x, tangent = (tf.constant(v, tf.float32) for v in rng.normal(size=(2, *shape)))

    def product(x):
        with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
            y = (x + layer(x, training=True)) ** 3
        return accumulator.jvp(y)

    def plain(x):
        reduced = tuple(range(len(shape) - 1))
        y = x - x.mean(reduced)
        return (
            x + (y if make is syncbn.SyncCentering else y / np.sqrt(x.var(reduced) + 1e-3))
        ) ** 3

    wide, step = x.numpy().astype("float64"), 1e-5 * tangent.numpy().astype("float64")
    truth = (plain(wide + step) - plain(wide - step)) / 2e-5
    ours = (tf.function(product) if graph else product)(x)
    np.testing.assert_allclose(ours, truth, atol=2e-5 * np.abs(truth).max())


FOLLOWED = [
    (syncbn.SyncBatchNormalization, "inputs"),
    (syncbn.SyncBatchNormalization, "gamma"),
    (syncbn.SyncBatchNormalization, "another factor"),
    (syncbn.SyncCentering, "inputs"),
    (syncbn.SyncCentering, "another factor"),
]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", [(6, 5), (64, 48, 64)], ids=["plain", "fused"])
@pytest.mark.parametrize(("make", "followed"), FOLLOWED)
def test_forward_mode_goes_through_a_branch_of_a_graph(make, followed, shape, masked):
    # TensorFlow differentiates a copy of the branch, whatever is watched.
    rng = np.random.default_rng(0)
    mask = tf.constant(rng.random(shape[:-1]) < 0.7) if masked else None
    layer = make(dtype="float32")
    layer.build((None, *shape[1:]))
    x = tf.constant(rng.normal(size=shape), tf.float32)
    channels = tf.constant(rng.normal(1.5, 0.3, shape[-1]), tf.float32)
    if make is syncbn.SyncBatchNormalization:
        layer.set_weights([channels, *layer.get_weights()[1:]])

    @tf.function
    def product(x, factor, tangent):
        primals = {"inputs": x, "another factor": factor}
        if followed == "gamma":
            primals["gamma"] = layer.gamma.value if KERAS_3 else layer.gamma
        with tf.autodiff.ForwardAccumulator(primals[followed], tangent) as accumulator:
            y = tf.cond(
                tf.reduce_all(x > -1e9),
                lambda: (x + factor * layer(x, training=True, mask=mask)) ** 3,
                lambda: x,
            )
        return accumulator.jvp(y)

    def plain(x, gamma, factor):
        if make is syncbn.SyncCentering:
            y = oracle.centering(x, x, mask=mask).y
        else:
            y = oracle.batch_normalization(x, x, gamma, 0.0, mask=mask).y
        return (x + factor * y) ** 3

    at = dict(zip(["inputs", "gamma", "another factor"], [x, channels, channels], strict=True))
    tangent = tf.constant(rng.normal(size=at[followed].shape), tf.float32)
    wide = {name: value.numpy().astype("float64") for name, value in at.items()}
    step = 1e-5 * tangent.numpy().astype("float64")
    ends = (plain(*{**wide, followed: wide[followed] + way * step}.values()) for way in (1, -1))
    truth = (next(ends) - next(ends)) / 2e-5
    ours = product(x, channels, tangent)
    np.testing.assert_allclose(ours, truth, atol=2e-5 * np.abs(truth).max())


@pytest.mark.parametrize("make", MAKERS)
def test_forward_mode_in_a_branch_does_not_forget_the_shape(make):
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32")
    layer = make(dtype="float32")
    layer.build((None, 3))

    def product(x, tangent):
        def branch():
            same = tf.numpy_function(lambda: np.ones((6, 3), "float32"), [], tf.float32)
            same.set_shape([None, 3])  # which is not in a copy
            return layer(same * x, training=True) ** 3

        with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
            y = tf.cond(tf.reduce_all(x > -1e9), branch, lambda: x)
        return accumulator.jvp(y)

    eager = product(*map(tf.constant, x))  # of which the tests above say that it is right
    np.testing.assert_allclose(tf.function(product)(*x), eager, rtol=1e-5, atol=1e-5)


def through_a_vectorized_map(normalize):
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.vectorized_map(normalize, tf.stack([x, 2.0 * x**2]))
            loss = tf.reduce_sum(y**3)
        return tape.gradient(loss, x)

    return gradient


def of_a_jacobian(normalize):
    def gradient(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_mean(normalize(x) ** 3, 0)[:2]
            loss = tf.reduce_sum(tape.jacobian(y, x) ** 2)
        return outer.gradient(loss, x)

    return gradient


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("way", [through_a_vectorized_map, of_a_jacobian])
@pytest.mark.parametrize("gpus", [False, True], ids=["", "gpus"])
@pytest.mark.parametrize("shape", [(6, 3), (4096, 64)], ids=["plain", "fused"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_gradients_go_through_vectorized_loops(make, way, gpus, shape, graph, monkeypatch):
    # TensorFlow drops custom gradients there.
    monkeypatch.setattr(xla, "on_gpus", lambda: gpus)
    x = tf.random.stateless_normal(shape, [1, 2])
    layer = make(dtype="float32")
    layer.build((None, shape[1]))

    def formula(x):
        mean, variance = tf.nn.moments(x, [0])
        centers = make is syncbn.SyncCentering
        return x - mean if centers else (x - mean) * tf.math.rsqrt(variance + 1e-3)

    ours = way(lambda x: layer(x, training=True))
    ours = (tf.function(ours) if graph else ours)(x)
    truth = way(formula)(tf.cast(x, tf.float64))
    np.testing.assert_allclose(ours, truth, atol=2e-5 * np.abs(truth).max())
