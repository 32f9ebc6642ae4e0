"""The layers in one process: the stock layer's behaviour, its arguments, and frozen layers."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import KERAS_3, keras, with_renormalization

STATISTICS = ("moving_mean", "moving_variance")


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype("float32")


def pair(**options):
    return syncbn.SyncBatchNormalization(**options), keras.layers.BatchNormalization(**options)


def test_it_is_a_batch_normalization():
    assert isinstance(syncbn.SyncBatchNormalization(), keras.layers.BatchNormalization)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1},
        {"axis": -2, "momentum": 0.5, "epsilon": 0.1},
        {"center": False},
        {"scale": False},
        pytest.param(
            {"gamma_initializer": "random_normal", "beta_initializer": keras.initializers.Ones()},
            id="initializers",  # an object's own text is another one in each process
        ),
        {"moving_mean_initializer": "ones", "moving_variance_initializer": "zeros"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3), (3, 4, 5, 2), (2, 3, 2, 4, 3)], ids=str)
def test_alone_it_is_the_stock_layer(shape, options):
    if not KERAS_3:
        # The fused kernels of Keras 2 apply Bessel's correction to the moving variance.
        options = {**options, "synchronized": True}
    ours, stock = pair(**options)
    x, dy = tf.constant(data(*shape)), tf.constant(data(*shape, seed=1))
    ours.build(shape)
    stock.build(shape)
    stock.set_weights(ours.get_weights())
    results = []
    for layer in (ours, stock):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        gradients = tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)
        results.append([y, *gradients, *layer.get_weights(), layer(x), layer(x, training=False)])
    for one, other in zip(*results, strict=True):
        scale = np.abs(other).max(initial=1)
        np.testing.assert_allclose(one, other, atol=2e-5 * scale)


def test_inference_is_the_stock_layers_bit_for_bit():
    ours, stock = pair()
    x = data(4, 5, 6)
    ours(x, training=True)
    stock.build(x.shape)
    stock.set_weights(ours.get_weights())
    np.testing.assert_array_equal(ours(x), stock(x))


@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_a_frozen_layer_uses_the_moving_statistics_and_leaves_them_alone(make):
    layer = make()
    x = data(8, 3)
    layer(x, training=True)
    before = layer.get_weights()
    inference = layer(x, training=False)
    layer.trainable = False
    np.testing.assert_array_equal(layer(x, training=True), inference)
    for now, then in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_centering_subtracts_the_learned_constant_at_inference():
    layer = syncbn.SyncCentering(momentum=0.0, moving_mean_initializer="ones")
    x = data(8, 4, 3)
    np.testing.assert_allclose(layer(x), x - 1, rtol=1e-6)
    y = layer(x, training=True)
    np.testing.assert_allclose(y, x - x.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(y.numpy().std((0, 1)), x.std((0, 1)), rtol=1e-5)
    new = data(2, 4, 3, seed=5)
    np.testing.assert_allclose(layer(new), new - x.mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_outputs_have_the_compute_dtype_and_statistics_are_float32_at_least(make, policy):
    layer = make(dtype=policy)
    compute = policy.removeprefix("mixed_")
    for training in (True, False):
        assert layer(data(4, 3), training=training).dtype == compute
    for name in STATISTICS:
        if hasattr(layer, name):
            dtype = "float64" if policy == "float64" else "float32"
            assert getattr(layer, name).dtype == dtype


def test_float16_inputs_whose_squares_overflow_have_finite_statistics():
    layer = syncbn.SyncBatchNormalization(momentum=0.0, dtype="mixed_float16")
    x = data(64, 3) * 5000
    assert np.isfinite(layer(x, training=True)).all()
    np.testing.assert_allclose(
        layer.moving_variance, x.astype("float16").astype("float64").var(0), rtol=1e-3
    )


def test_regularizers_and_constraints_act_on_gamma_and_beta():
    layer = syncbn.SyncBatchNormalization(
        gamma_regularizer=keras.regularizers.L2(0.5),
        beta_constraint=keras.constraints.NonNeg(),
    )
    layer(data(4, 3), training=True)
    np.testing.assert_allclose(sum(layer.losses), 0.5 * 3)
    assert isinstance(layer.beta.constraint, keras.constraints.NonNeg)


def test_the_cumulative_average_weighs_batches_by_their_counts():
    layer = syncbn.SyncBatchNormalization(momentum=None)
    batches = [data(n, 2, 3, seed=n) + n for n in (7, 1, 0, 4)]
    for batch in batches:
        layer(batch, training=True)
    seen = [b.astype("float64") for b in batches if len(b)]
    weights = [len(b) for b in seen]
    mean = np.average([b.mean((0, 1)) for b in seen], axis=0, weights=weights)
    variance = np.average([b.var((0, 1)) for b in seen], axis=0, weights=weights)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_count, [2 * 12] * 3)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("momentum", [0.0, None], ids=str)
@pytest.mark.parametrize("deviation", [1e-4, 1e-11], ids=str)
def test_a_small_variance_keeps_its_digits_beside_an_average_of_one(deviation, momentum, graph):
    x = data(16, 3) * np.float32(deviation)
    truth = x.astype("float64").var(0)
    layer = syncbn.SyncBatchNormalization(momentum=momentum, epsilon=1e-30)
    layer.build(x.shape)
    step = tf.function(lambda x: layer(x, training=True)) if graph else layer
    for _ in range(5):
        step(x, **({} if graph else {"training": True}))
        np.testing.assert_allclose(layer.moving_variance, truth, rtol=1e-6)


def test_the_unbiased_variance_of_a_single_element_is_zero():
    layer = syncbn.SyncBatchNormalization(momentum=0.0, unbiased_moving_variance=True)
    layer(data(1, 3), training=True)
    np.testing.assert_array_equal(layer.moving_variance, [0, 0, 0])


@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
def test_options_round_trip(make):
    changed = {"axis": 1, "momentum": None, "communicator": "local", "name": "it"}
    if make is syncbn.SyncBatchNormalization:
        changed |= {"epsilon": 0.1, "center": False, "unbiased_moving_variance": True}
    layer = make(**changed)
    again = make.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    for name, value in changed.items():
        assert getattr(again, name) == value
    layer.build((None, 3, 4))
    assert make.from_config(layer.get_config()).get_config() == layer.get_config()


def test_a_plain_layers_config_makes_a_synchronized_one():
    plain = keras.layers.BatchNormalization(momentum=0.7, epsilon=0.2, name="plain")
    ours = syncbn.SyncBatchNormalization.from_config(plain.get_config())
    assert (ours.momentum, ours.epsilon, ours.name) == (0.7, 0.2, "plain")


def test_the_config_of_a_communicator_is_its_name():
    layer = syncbn.SyncCentering(communicator=syncbn.LocalCommunicator())
    assert layer.get_config()["communicator"] == "local"


def test_weights_are_in_the_order_of_keras():
    layer = syncbn.SyncBatchNormalization()
    layer.build((None, 2))
    layer.set_weights([np.full(2, v, "float32") for v in (1, 2, 3, 4)])
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    assert [float(getattr(layer, name)[0]) for name in names] == [1, 2, 3, 4]


def test_moving_statistics_are_read_on_demand_and_averaged():
    layer = syncbn.SyncBatchNormalization(momentum=None)
    layer.build((None, 2))
    for name in (*STATISTICS, "moving_count"):
        variable = getattr(layer, name)
        variable = variable.value if KERAS_3 else variable
        assert variable.synchronization == tf.VariableSynchronization.ON_READ
        assert variable.aggregation == tf.VariableAggregation.MEAN
        assert not variable.trainable


def test_epsilon_zero_makes_no_nan_of_nothing_or_of_a_constant():
    layer = syncbn.SyncBatchNormalization(epsilon=0.0)
    for x in (tf.zeros([0, 3]), tf.ones([4, 3])):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        gradients = tape.gradient(y, [x, *layer.trainable_variables])
        for value in (y, *gradients, *layer.get_weights()):
            assert np.isfinite(value).all()


@pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
@pytest.mark.parametrize("training", [False, True])
def test_a_built_layer_may_be_traced_for_channels_that_the_trace_does_not_know(make, training):
    layer = make()
    layer.build((None, 3))
    call = tf.function(
        lambda x: layer(x, training=training), input_signature=[tf.TensorSpec([None, None])]
    )
    assert call(tf.ones([4, 3])).shape == (4, 3)


def test_axis_can_be_any_integer():
    layer = syncbn.SyncBatchNormalization(axis=np.int64(1))
    layer.build((None, 3, 4))
    assert syncbn.SyncCentering(axis=np.int64(1)).axis == 1
    assert layer.moving_mean.shape == (3,)


def test_a_subclass_may_have_weights_of_its_own():
    class Counting(syncbn.SyncBatchNormalization):
        def build(self, shape):
            super().build(shape)
            self.steps = self.add_weight(
                name="steps", shape=(), dtype="int64", initializer="zeros", trainable=False
            )

    layer = Counting()
    layer.build((None, 3))
    assert layer.steps.dtype == "int64"


def test_a_training_flag_can_be_a_tensor():
    layer = syncbn.SyncBatchNormalization(momentum=0.0)
    x = data(5, 3)
    layer.build(x.shape)

    @tf.function
    def call(training):
        return layer(x, training=training)

    np.testing.assert_allclose(call(tf.constant(False)), x / np.sqrt(1.001), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))
    np.testing.assert_allclose(call(tf.constant(True)).numpy().mean(0), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(layer.moving_mean, x.mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, pytest.param({"renorm": True}, marks=with_renormalization)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, "tensor"], ids=str)
def test_whether_the_statistics_move_can_be_a_tensor(options, training):
    layer, other = (syncbn.SyncBatchNormalization(**options) for _ in range(2))
    batches = [data(5, 3, seed=seed) for seed in range(3)]
    for one in (layer, other):
        one.build((None, 3))

    @tf.function
    def call(x, update, training):
        return layer(x, training=training, update_moving_statistics=update)

    batches.insert(2, np.full((5, 3), np.nan, "float32"))
    for update, x in zip((True, False, False, True), batches, strict=True):
        # Neither does it trace again.
        arguments = tf.constant(update), tf.constant(True) if training == "tensor" else training
        before = other.get_weights()
        y = call(x, *arguments)
        np.testing.assert_allclose(y, other(x, training=True), atol=1e-6)
        if not update:
            other.set_weights(before)
        for ours, theirs in zip(layer.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert call.experimental_get_tracing_count() == 1


def test_a_mask_travels_through_a_model():
    model = keras.Sequential(
        [
            keras.layers.Embedding(5, 3, mask_zero=True),
            syncbn.SyncBatchNormalization(momentum=0.0),
            syncbn.SyncCentering(momentum=0.0),
        ]
    )
    tokens = np.array([[1, 2, 0], [3, 0, 0]])
    y = model(tokens, training=True)
    seen = model.layers[0](tokens).numpy()[tokens != 0]
    np.testing.assert_allclose(model.layers[1].moving_mean, seen.mean(0), atol=1e-6)
    np.testing.assert_allclose(y.numpy()[tokens != 0].mean(0), np.zeros(3), atol=1e-6)
