"""Inputs that are not floats, and inputs whose rank a trace does not know."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests import oracle
from tests.keras import KERAS_3, keras

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
SHAPES = pytest.mark.parametrize("shape", [(6, 3), (4, 5, 3), (4, 5, 6, 3), (2, 3, 4, 5, 3)])


def truth(make, x, mask=None):
    x = x.astype("float64")
    if make is syncbn.SyncCentering:
        return oracle.centering(x, 0 * x, mask=mask)
    return oracle.batch_normalization(x, 0 * x, 1.0, 0.0, mask=mask)


TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3, "float64": 1e-12}


@BOTH
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("int32", 70_000), ("bool", 1)])
def test_integers_are_exact_in_training(make, policy, dtype, largest):
    # 16 bits cannot hold 70,000, nor bfloat16 257.
    shape = (4, 5, 3)
    x = np.random.default_rng(0).integers(0, largest, shape, endpoint=True).astype(dtype)
    layer = make(momentum=0.0, dtype=policy)
    layer.build(shape)
    # An array, and a tensor in a graph.
    layer(x[:2], training=True)
    y = tf.function(lambda x: layer(x, training=True))(x)
    assert y.dtype == layer.compute_dtype
    expected = truth(make, x)
    tolerance = TOLERANCE[layer.compute_dtype]
    # float16 cannot hold all that is left of 70,000 when it is centered.
    held = np.abs(expected.y) < np.finfo("float16").max
    assert held.any()
    scale = np.abs(expected.y[held]).max()
    y = tf.cast(y, tf.float64).numpy()[held]
    np.testing.assert_allclose(y, expected.y[held], rtol=tolerance, atol=tolerance * scale)
    accuracy = 1e-12 if policy == "float64" else 1e-6
    np.testing.assert_allclose(layer.moving_mean, expected.mean, rtol=accuracy)
    if make is syncbn.SyncBatchNormalization:
        np.testing.assert_allclose(layer.moving_variance, expected.variance, rtol=accuracy)


@BOTH
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float16", "mixed_bfloat16"),
        ("float32", "float64"),
    ],
)
def test_inputs_that_keras_does_not_cast_are_computed_as_wide_as_the_outputs(
    make, given, policy, graph
):
    # What is left of them when they are centered is more than float16 holds.
    x = np.random.default_rng(0).choice([6e4, 6e4, 6e4, -6e4], size=(16, 5, 3))
    x = tf.cast(x + np.arange(16).reshape(-1, 1, 1), given)
    layer = make(autocast=False, dtype=policy, momentum=0.0)
    layer.build(x.shape)
    step = tf.function(lambda x: layer(x, training=True)) if graph else layer
    y = step(x, **({} if graph else {"training": True}))
    assert y.dtype == layer.compute_dtype
    expected = truth(make, tf.cast(x, tf.float64).numpy())
    tolerance = TOLERANCE[layer.compute_dtype]
    scale = np.abs(expected.y).max()
    np.testing.assert_allclose(tf.cast(y, tf.float64), expected.y, atol=tolerance * scale, rtol=0)
    np.testing.assert_allclose(layer.moving_mean, expected.mean, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_converted_model_takes_the_integers_that_it_took(dtype, policy):
    shape = (8, 6, 6, 3)
    inputs = keras.Input(shape[1:], dtype=dtype)
    x = keras.layers.BatchNormalization(momentum=0.5, dtype=policy, name="first")(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2 if dtype == "bool" else 256, shape).astype(dtype)
    model.get_layer("first").set_weights(list(rng.random((4, 3))))
    first = keras.Model(model.input, x)
    before, dtype_before = model.predict(images, verbose=0), first(images).dtype
    syncbn.convert_sync_batchnorm(model)
    np.testing.assert_array_equal(model.predict(images, verbose=0), before)
    assert keras.Model(model.input, x)(images).dtype == dtype_before
    old = model.get_layer("first").moving_mean.numpy()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(images, np.zeros((8, 2)), batch_size=8, verbose=0)
    expected = (old + images.astype("float64").mean((0, 1, 2))) / 2
    np.testing.assert_allclose(model.get_layer("first").moving_mean, expected, rtol=1e-6)


def call_of_unknown_rank(layer, training, masked):
    specs = [tf.TensorSpec(None), tf.TensorSpec(None, tf.bool)]

    def call(x, mask):
        # No layer of Keras 3 accepts a tensor of unknown rank.
        call = layer.call if KERAS_3 else layer
        return call(x, training=training, mask=mask if masked else None)

    return tf.function(call, specs)


@BOTH
@SHAPES
@pytest.mark.parametrize("masked", [False, True])
def test_the_rank_may_be_unknown(make, shape, masked):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=shape).astype("float32")
    mask = rng.random(shape[:-1]) < 0.7
    layer = make(momentum=0.0)
    layer.build(shape)
    y = call_of_unknown_rank(layer, True, masked)(x, mask)
    expected = truth(make, x, mask if masked else None)
    np.testing.assert_allclose(y, expected.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, expected.mean, rtol=1e-6)
    y = call_of_unknown_rank(layer, False, masked)(x, mask)
    np.testing.assert_allclose(y, layer(x, training=False), rtol=1e-5, atol=1e-5)


@BOTH
def test_another_rank_than_the_layer_was_built_for(make):
    layer = make()
    layer.build((None, 4, 3))
    for training in (False, True):
        with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected"):
            call_of_unknown_rank(layer, training, False)(np.ones((2, 3)), True)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 calls layers on tensors of unknown rank")
def test_keras_3_itself_takes_no_unknown_rank():
    plain = keras.layers.BatchNormalization()
    plain.build((None, 3))
    with pytest.raises(ValueError, match="unknown TensorShape"):
        tf.function(lambda x: plain(x), [tf.TensorSpec(None)])(np.ones((2, 3), "float32"))


@pytest.mark.parametrize("known", [False, True], ids=["", "known"])
@pytest.mark.parametrize("shape", [(3,), (4, 4, 3)])
def test_a_pipeline_with_a_numpy_function_trains_and_predicts(shape, known):
    if KERAS_3 and not known:
        pytest.skip("Keras 3 itself takes no unknown rank, as tested above")
    layers = [syncbn.SyncBatchNormalization(momentum=0.0), syncbn.SyncCentering(momentum=0.0)]
    # Not `Flatten`, with which Keras 3.10 fails where only the channels are known.
    flat = keras.layers.Reshape((np.prod(shape).item(),))
    model = keras.Sequential([keras.Input(shape), *layers, flat])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(3, 2, size=(8, *shape)).astype("float32")
    plain = tf.data.Dataset.from_tensor_slices(x).batch(8)
    data = plain.map(lambda x: tf.numpy_function(lambda x: x, [x], tf.float32))
    if known:
        data = data.map(lambda x: tf.ensure_shape(x, [None] * len(shape) + [3]))
    model.fit(data.map(lambda x: (x, tf.reshape(x, [8, -1]))), shuffle=False, verbose=0)
    reduced = tuple(range(len(shape)))
    np.testing.assert_allclose(layers[0].moving_mean, x.mean(reduced), rtol=1e-5)
    y = model.predict(data, verbose=0)
    np.testing.assert_allclose(y, model.predict(plain, verbose=0), rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_an_array_where_keras_does_not_convert_it(make, training, dtype):
    x = np.random.default_rng(0).normal(3, 20, size=(6, 3)).astype(dtype)
    layer = make(momentum=0.0)
    layer.build(x.shape)
    y = layer.call(x, training=training)
    assert y.dtype == "float32"
    np.testing.assert_allclose(y, layer(x, training=training), rtol=1e-6, atol=1e-6)
    if KERAS_3:
        trainable, other = (
            [v.value for v in vs]
            for vs in (layer.trainable_variables, layer.non_trainable_variables)
        )
        y, _ = layer.stateless_call(trainable, other, x, training=training)
        np.testing.assert_allclose(y, layer(x, training=training), rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("masked", [False, True])
def test_all_axes_may_be_those_of_channels(make, masked, graph):
    if KERAS_3 and make is syncbn.SyncBatchNormalization:
        pytest.skip("Keras 3 normalizes one axis")
    x = np.random.default_rng(0).normal(3, 2, size=(4, 3)).astype("float32")
    layer = make(axis=[0, 1], momentum=0.0)
    layer.build(x.shape)
    mask = tf.constant([True, True, False, True]) if masked else None
    step = tf.function(lambda x: layer(x, training=True, mask=mask)) if graph else layer
    y = step(x, **({} if graph else {"training": True, "mask": mask}))
    seen = mask.numpy() if masked else np.ones(4, bool)
    # Each element is a channel of its own, and so its mean.
    np.testing.assert_allclose(y.numpy()[seen], np.zeros((seen.sum(), 3)), atol=1e-6)
    np.testing.assert_allclose(np.reshape(layer.moving_mean, [4, 3])[seen], x[seen], rtol=1e-6)


def ragged(values, lengths):
    return tf.RaggedTensor.from_nested_row_lengths(values, lengths)


@BOTH
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("lengths", "sample", "axis"),
    [([[2, 0, 4]], (3,), -1), ([[2, 0, 4]], (2, 3), 3), ([[1, 0, 3], [1, 0, 3, 2]], (3,), 3)],
    ids=["steps", "uniform within", "ragged within"],
)
def test_the_elements_of_a_ragged_tensor_count(make, lengths, sample, axis, masked, graph):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, size=(2, 6, *sample)).astype("float32")
    seen = rng.random((6, *sample[:-1])) < 0.6
    layer = make(momentum=0.0, axis=axis)
    layer.build((None, *[None] * len(lengths), *sample))

    def step(x, dy, training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            mask = ragged(seen, lengths) if masked else None
            y = layer(ragged(x, lengths), training=training, mask=mask)
        return y, tape.gradient(y.flat_values, x, dy)

    step = tf.function(step) if graph else step
    y, dx = step(tf.constant(x), tf.constant(dy), tf.constant(True))
    wide, wide_dy = x.astype("float64"), dy.astype("float64")
    normalizes, of = make is syncbn.SyncBatchNormalization, {"mask": seen if masked else None}
    if normalizes:
        expected = oracle.batch_normalization(wide, wide_dy, 1.0, 0.0, **of)
    else:
        expected = oracle.centering(wide, wide_dy, **of)
    assert y.shape.as_list()[-len(sample) :] == list(sample)
    for own, given in zip(y.nested_row_lengths(), lengths, strict=True):
        np.testing.assert_array_equal(own, given)
    np.testing.assert_allclose(y.flat_values, expected.y, atol=1e-5)
    np.testing.assert_allclose(dx, expected.dx, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, expected.mean, rtol=1e-6)
    y, _ = step(tf.constant(x), tf.constant(dy), tf.constant(False))
    deviation = np.sqrt(layer.moving_variance + 1e-3) if normalizes else 1.0
    np.testing.assert_allclose(y.flat_values, (x - layer.moving_mean) / deviation, atol=1e-5)


@pytest.mark.parametrize("convert", [False, True], ids=["", "converted"])
def test_a_model_of_ragged_tensors_trains(convert):
    if convert and not KERAS_3:
        pytest.skip("the plain layer of Keras 2 takes no ragged tensors")
    make = keras.layers.BatchNormalization if convert else syncbn.SyncBatchNormalization
    inputs = keras.Input((None, 3), ragged=True)
    layers = [make(momentum=0.0), syncbn.SyncCentering(momentum=0.0)]
    last = keras.layers.Lambda(lambda x: tf.reduce_sum(x, 1), output_shape=(3,))
    model = keras.Model(inputs, last(layers[1](layers[0](inputs))))
    if convert:
        syncbn.convert_sync_batchnorm(model)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(3, 2, size=(6, 3)).astype("float32")
    model.fit(ragged(x, [[2, 1, 3]]), np.zeros((3, 3)), batch_size=3, verbose=0)
    np.testing.assert_allclose(layers[0].moving_mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layers[1].moving_mean, np.zeros(3), atol=1e-6)


@BOTH
def test_replicas_have_ragged_tensors_of_different_sizes(make, mirrored):
    rng = np.random.default_rng(0)
    values = [rng.normal(3, 2, size=(size, 3)).astype("float32") for size in (6, 0, 1)]
    lengths = [[2, 0, 4], [], [1]]
    replicas = mirrored(3)
    layers = replicas.build(lambda rank: make(momentum=0.0), (None, None, 3))
    arguments = [(values[rank], tf.constant(lengths[rank], tf.int64)) for rank in range(3)]

    def step(layer, values, lengths):
        return layer(ragged(values, [lengths]), training=True).flat_values

    outputs = replicas.run(step, layers, arguments)
    expected = truth(make, np.concatenate(values))
    ours = np.concatenate([outputs[rank] for rank in range(3)])
    np.testing.assert_allclose(ours, expected.y, atol=1e-5)
    for mean in replicas.moving(layers)["moving_mean"].values():
        np.testing.assert_allclose(mean, expected.mean, rtol=1e-6)
