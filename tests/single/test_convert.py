"""Converted models are the models they were, but synchronized; and plain again when reverted."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.keras_compat.layer_names import model_and_layers, named_layers
from syncbn._src.models.conversion import convert_sync_batchnorm, revert_sync_batchnorm
from tests.keras import KERAS_3, keras

Plain = keras.layers.BatchNormalization
Sync = syncbn.SyncBatchNormalization


def sequential():
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            Plain(momentum=0.5, gamma_regularizer="l2", beta_constraint="non_neg", name="first"),
            Plain(axis=1, scale=False, epsilon=0.01, dtype="float64", name="second"),
            keras.layers.GlobalAveragePooling2D(),
            Plain(center=False, trainable=False, name="frozen"),
            keras.layers.Dense(2),
        ],
        name="model",
    )


def functional():
    """Layers that are shared, nested, and wrapped."""
    shared = Plain(name="shared")
    inner = keras.Sequential([keras.Input((4, 4, 4)), Plain(name="bn")], name="inner")
    wrapped = keras.layers.TimeDistributed(Plain(name="wrapped"), name="each")
    x = inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3)(x)
    x = keras.layers.Add()([shared(x), shared(inner(x))])
    x = keras.layers.GlobalAveragePooling2D()(wrapped(keras.layers.Reshape((2, 8, 4))(x)))
    return keras.Model(inputs, keras.layers.Dense(2)(x), name="model")


@keras.utils.register_keras_serializable("test_convert")
class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.listed = [Plain(name="zero"), keras.layers.Activation("relu"), Plain(name="two")]
        self.named = {"a": Plain(name="a")}

    def build(self, input_shape):
        for layer in [*self.listed, self.named["a"]]:
            layer.build(input_shape)
        super().build(input_shape)

    def call(self, inputs, training=None):
        for layer in [*self.listed, self.named["a"]]:
            kwargs = {"training": training} if isinstance(layer, Plain) else {}
            inputs = layer(inputs, **kwargs)
        return inputs


@keras.utils.register_keras_serializable("test_convert")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(name="model")
        self.conv = keras.layers.Conv2D(4, 3)
        self.block = Block(name="block")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs, training=None):
        return self.dense(self.pool(self.block(self.conv(inputs), training=training)))

    def get_config(self):
        return {}


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6, 6, 3), "float32"))
    return model


NAMES = {
    sequential: ["first", "second", "frozen"],
    functional: ["shared", "inner/bn", "each/wrapped"],
    subclassed: ["block/zero", "block/two", "block/a"],
}
every_model = pytest.mark.parametrize("build", NAMES)


def set_randomly(model, seed=0):
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


def data():
    rng = np.random.default_rng(1)
    x = rng.normal(1, 2, size=(8, 6, 6, 3)).astype("float32")
    return x, rng.normal(size=(8, 2)).astype("float32")


def normalizations(model):
    layers = named_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, Plain)}


def variables_of(optimizer):
    variables = optimizer.variables
    return variables() if callable(variables) else variables


def identities(variables):
    return [id(variable) for variable in variables]


def state(model):
    """All that a failed conversion could have changed."""
    layers = {id(model): model, **named_layers(model)}
    return [
        (id(layer), type(layer), list(vars(layer).items()), identities(layer.weights))
        for layer in layers.values()
    ]


def assert_all_equal(arrays, others):
    for one, other in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_all_close(arrays, others):
    for one, other in zip(arrays, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@every_model
def test_a_converted_model_is_the_model_it_was(build):
    model = set_randomly(build())
    x, _ = data()
    outputs, values = model(x).numpy(), model.get_weights()
    layers, weights = normalizations(model), identities(model.weights)
    trainable = identities(model.trainable_weights)
    configs = {name: layer.get_config() for name, layer in layers.items()}

    result = convert_sync_batchnorm(model, return_conversion=True)

    assert result.model is model
    assert sorted(result.converted) == sorted(NAMES[build])
    assert result.unchanged == {}
    assert normalizations(model) == layers
    assert identities(model.weights) == weights
    assert identities(model.trainable_weights) == trainable
    assert_all_equal(model.get_weights(), values)
    assert_all_equal(model(x).numpy(), outputs)
    for name, layer in layers.items():
        assert type(layer) is Sync
        own = {"communicator": "auto", "unbiased_moving_variance": not KERAS_3 and layer.fused}
        configs[name].pop("synchronized", None)
        made = Sync.from_config({**configs[name], **own})
        assert layer.get_config() == made.get_config()
        made.build((4,) * layer.input_spec.ndim)
        assert vars(layer).keys() - {"_data_format"} == vars(made).keys() - {"_data_format"}


@every_model
def test_reverting_undoes_it(build):
    model = set_randomly(build())
    x, _ = data()
    outputs, values = model(x).numpy(), model.get_weights()
    layers, weights = normalizations(model), identities(model.weights)
    before = [(layer.get_config(), set(vars(layer))) for layer in layers.values()]
    if KERAS_3:
        kinds = [(v.synchronization, v.aggregation) for v in model.weights]
    convert_sync_batchnorm(model, communicator="mpi")

    result = revert_sync_batchnorm(model, return_conversion=True)

    assert sorted(result.converted) == sorted(NAMES[build])
    assert result.unchanged == {}
    assert [(layer.get_config(), set(vars(layer))) for layer in layers.values()] == before
    assert all(type(layer) is Plain for layer in layers.values())
    assert identities(model.weights) == weights
    if KERAS_3:
        assert [(v.synchronization, v.aggregation) for v in model.weights] == kinds
    assert_all_equal(model.get_weights(), values)
    assert_all_equal(model(x).numpy(), outputs)


@every_model
def test_training_goes_on_as_if_nothing_had_happened(build):
    x, y = data()
    model, twin = set_randomly(build()), set_randomly(build())
    for one in (model, twin):
        # The epsilon keeps Adam from blowing up rounding errors where gradients are zero.
        one.compile(keras.optimizers.Adam(0.01, epsilon=0.1), "mse")
        one.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    before = model.predict(x, verbose=0)
    slots = identities(variables_of(model.optimizer))

    convert_sync_batchnorm(model)

    assert model.train_function is model.predict_function is None  # traces of the old layers
    assert_all_equal(model.predict(x, verbose=0), before)
    for one in (model, twin):
        one.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    assert identities(variables_of(model.optimizer)) == slots
    assert_all_close(
        [v.numpy() for v in variables_of(model.optimizer)],
        [v.numpy() for v in variables_of(twin.optimizer)],
    )
    assert_all_close(model.get_weights(), twin.get_weights())
    assert_all_close(model.predict(x, verbose=0), twin(x))


def test_replicas_of_a_converted_model_train_as_one_with_the_whole_batch(mirrored):
    def build():
        model = set_randomly(functional())
        model.compile(keras.optimizers.SGD(0.01), "mse")
        return model

    x, y = data()
    whole = build()
    strategy = mirrored(2).strategy
    with strategy.scope():
        model = build()
    model.predict(x, verbose=0)
    convert_sync_batchnorm(model)
    for one in (whole, model):
        one.fit(x, y, batch_size=8, epochs=3, verbose=0)
    assert_all_close(model.get_weights(), whole.get_weights())
    for layer in normalizations(model).values():
        statistic = layer.moving_mean.value if KERAS_3 else layer.moving_mean
        assert statistic.synchronization == tf.VariableSynchronization.ON_READ
        assert statistic.aggregation == tf.VariableAggregation.MEAN
        assert len(strategy.experimental_local_results(statistic)) == 2
    values = model.get_weights()
    revert_sync_batchnorm(model)
    assert_all_equal(model.get_weights(), values)
    model.fit(x, y, batch_size=8, verbose=0)
    assert not np.array_equal(model.get_weights()[-1], values[-1])


def test_a_layer_may_have_the_name_of_its_model():
    inner = keras.layers.Dense(2, name="same")
    model = keras.Sequential([keras.Input((4,)), inner], name="same")
    layers = model_and_layers(model)
    assert layers["same_1"] is model
    assert layers["same"] is inner


def test_models_in_which_nothing_is_left_to_do():
    model = sequential()
    assert set(revert_sync_batchnorm(model, return_conversion=True).unchanged.values()) == {
        "is plain already"
    }
    convert_sync_batchnorm(model)
    again = convert_sync_batchnorm(model, communicator="mpi", return_conversion=True)
    assert set(again.unchanged.values()) == {"is a SyncBatchNormalization already"}
    assert again.converted == ()
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="dense")
    nothing = convert_sync_batchnorm(dense, return_conversion=True)
    assert str(nothing) == "dense: 0 of 0 normalizations converted"


def test_a_single_layer():
    layer = Plain(name="alone")
    layer.build((None, 3))
    assert convert_sync_batchnorm(layer, group_size=2, return_conversion=True).converted == (
        "alone",
    )
    assert type(layer) is Sync
    assert layer.get_config()["group_size"] == 2


class Renamed(Plain):
    def __init__(self, **kwargs):
        super().__init__(momentum=0.75, **kwargs)


class Doubled(Plain):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def test_layers_that_are_not_known_stay_and_are_reported():
    ours = [syncbn.SyncCentering(name="centering"), Sync(momentum=None, name="cumulative")]
    layers = [Renamed(name="renamed"), Doubled(name="doubled"), *ours]
    model = keras.Sequential([keras.Input((3,)), *layers], name="model")
    result = convert_sync_batchnorm(model, return_conversion=True)
    assert str(result) == (
        "model: 1 of 4 normalizations converted\n"
        "  doubled: is a Doubled, with methods of its own: call\n"
        "  centering: is a SyncCentering already\n"
        "  cumulative: is a SyncBatchNormalization already"
    )
    assert (type(layers[0]), layers[0].momentum) == (Sync, 0.75)
    assert str(revert_sync_batchnorm(model, return_conversion=True)) == (
        "model: 1 of 4 normalizations converted\n"
        "  doubled: is a Doubled, with methods of its own: call\n"
        "  centering: has no plain counterpart\n"
        "  cumulative: has momentum=None, which a plain layer cannot have"
    )
    assert [type(layer) for layer in layers] == [Plain, Doubled, syncbn.SyncCentering, Sync]


def others():
    made = [("synchronized=True", lambda: Plain(synchronized=True))]
    if not KERAS_3:
        made.append(("tf_keras", keras.layers.experimental.SyncBatchNormalization))
        made.append(("horovod", horovod_layer))
    return [pytest.param(make, id=name) for name, make in made]


def horovod_layer():
    layers = pytest.importorskip("horovod.tensorflow", reason="Horovod is not installed")
    return layers.SyncBatchNormalization()


@pytest.mark.parametrize("change", [convert_sync_batchnorm, revert_sync_batchnorm])
@pytest.mark.parametrize("make", others())
def test_synchronized_layers_of_others_are_understood(make, change):
    layer, twin = make(), Plain(**({} if KERAS_3 else {"fused": False}))
    for one in (layer, twin):
        one.build((None, 6, 6, 3))
        set_randomly(one)
    assert change(layer, return_conversion=True).converted == (layer.name,)
    assert type(layer) is (Sync if change is convert_sync_batchnorm else Plain)
    assert not KERAS_3 or change is convert_sync_batchnorm or not layer.synchronized
    x, _ = data()
    for training in (False, True, False):
        np.testing.assert_allclose(
            layer(x, training=training), twin(x, training=training), rtol=1e-4, atol=1e-5
        )
    assert_all_close(layer.get_weights(), twin.get_weights())


@pytest.mark.parametrize("unbiased", [None, True, False])
@pytest.mark.parametrize("shape", [(8, 3), (8, 2, 2, 3), (8, 2, 2, 2, 3)])
def test_the_moving_variance_is_what_it_would_have_been(shape, unbiased):
    """Keras 2 corrects it in its fused kernels, Keras 3 never."""
    layer, twin = Plain(momentum=0.5), Plain(momentum=0.5)
    for one in (layer, twin):
        one.build(shape)
    options = {} if unbiased is None else {"unbiased_moving_variance": unbiased}
    convert_sync_batchnorm(layer, **options)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    for one in (layer, twin):
        one(x, training=True)
    variance = np.var(x, axis=tuple(range(len(shape) - 1)))
    count = x.size // 3
    corrected = unbiased if unbiased is not None else not KERAS_3 and len(shape) > 2
    expected = 0.5 + 0.5 * variance * (count / (count - 1) if corrected else 1)
    np.testing.assert_allclose(layer.moving_variance.numpy(), expected, rtol=1e-5)
    if unbiased is None:
        assert_all_close(layer.get_weights(), twin.get_weights())


@pytest.mark.skipif(
    KERAS_3 and "renorm" not in Plain().get_config(), reason="needs Keras 3.14 or Keras 2"
)
def test_renormalization_is_kept():
    options = {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.5}, "momentum": 0.5}
    layer, twin = Plain(**options), Plain(**options)
    for one in (layer, twin):
        one.build((None, 6, 6, 3))
        set_randomly(one)
    weights = identities(layer.weights)
    convert_sync_batchnorm(layer)
    assert identities(layer.weights) == weights
    x, _ = data()
    for training in (True, True, False):
        assert_all_close(layer(x, training=training), twin(x, training=training))
    assert_all_close(layer.get_weights(), twin.get_weights())
    revert_sync_batchnorm(layer)
    assert layer.get_config() == {**twin.get_config(), "name": layer.name}
    assert_all_close(layer(x, training=True), twin(x, training=True))


@pytest.mark.skipif(KERAS_3, reason="Keras 3 has no such options")
@pytest.mark.parametrize("option", ["virtual_batch_size", "adjustment"])
def test_what_only_keras_2_knows_stays(option):
    layer = Plain(name="special", **{option: {"adjustment": print}.get(option, 4)})
    layer.build((None, 3))
    result = convert_sync_batchnorm(layer, return_conversion=True)
    assert result.unchanged == {"special": f"has {option}=, as only Keras 2 knows it"}
    assert type(layer) is Plain


def test_a_cumulative_average_begins_anew():
    model = set_randomly(sequential())
    convert_sync_batchnorm(model, momentum=None)
    layer, (x, _) = model.get_layer("first"), data()
    assert layer.weights[-1] is layer.moving_count
    model(x, training=True)
    features = model.layers[0](x).numpy()
    np.testing.assert_allclose(layer.moving_mean.numpy(), features.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(layer.moving_count.numpy(), np.full(4, 8 * 4 * 4))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_converted_model_can_be_saved_cloned_and_exported(policy, tmp_path):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = set_randomly(functional())
    finally:
        keras.mixed_precision.set_global_policy("float32")
    x, _ = data()
    checkpoint = tf.train.Checkpoint(model=model)
    outputs = model(x).numpy()
    convert_sync_batchnorm(model, communicator="mpi", momentum=None)
    assert_all_equal(model(x).numpy(), outputs)

    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    others = [keras.models.load_model(tmp_path / f"model.{end}") for end in ("keras", "h5")]
    others += [keras.models.clone_model(model) for _ in range(2)]
    others[2].set_weights(model.get_weights())
    tf.train.Checkpoint(model=others[3]).restore(path).expect_partial()
    for other in others:
        assert_all_equal(other.get_weights(), model.get_weights())
        assert other.get_layer("shared").communicator == "mpi"
    model.export(str(tmp_path / "exported"))
    served = tf.saved_model.load(str(tmp_path / "exported"))
    for output in (*[other(x) for other in others], served.serve(x)):
        np.testing.assert_allclose(output, outputs, rtol=1e-2 if "16" in policy else 1e-5)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 does not ask its layers about XLA")
def test_a_compiled_model_gives_up_xla_where_the_engine_does_not_work_with_it():
    model = sequential()
    model.compile("sgd", "mse", jit_compile=True)
    convert_sync_batchnorm(model, communicator="local")
    assert model.jit_compile
    revert_sync_batchnorm(model)
    with pytest.warns(match="Proceeding with `jit_compile=False`"):
        convert_sync_batchnorm(model, communicator="mpi")
    assert not model.jit_compile


APPLICATIONS = {
    "MobileNetV2": {"alpha": 0.35},
    "ResNet50": {},
    "EfficientNetB0": {},
}


@pytest.mark.parametrize("family", APPLICATIONS)
def test_applications(family):
    build = getattr(keras.applications, family)
    model = build(weights=None, input_shape=(32, 32, 3), classes=4, **APPLICATIONS[family])
    rng = np.random.default_rng(0)
    layers = normalizations(model)
    for layer in layers.values():
        layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    outputs = model(x, training=False).numpy()
    result = convert_sync_batchnorm(model, return_conversion=True)
    assert str(result) == f"{model.name}: {len(layers)} of {len(layers)} normalizations converted"
    assert len(layers) >= 49
    assert {type(layer) for layer in normalizations(model).values()} == {Sync}
    assert_all_equal(model(x, training=False).numpy(), outputs)
    assert len(revert_sync_batchnorm(model, return_conversion=True).converted) == len(layers)
    assert {type(layer) for layer in normalizations(model).values()} == {Plain}
    assert_all_equal(model(x, training=False).numpy(), outputs)


@pytest.mark.parametrize("change", [convert_sync_batchnorm, revert_sync_batchnorm])
def test_a_model_that_is_not_built_is_refused(change):
    layer = Plain(name="normalized")
    model = keras.Sequential([layer], name="model")
    with pytest.raises(ValueError, match=r"not built: model, normalized\. Call the model"):
        change(model)
    assert type(layer) is Plain
    block = Block(name="block")
    block.built = True
    with pytest.raises(ValueError, match="not built: zero, two, a"):
        change(block)
    assert type(block.listed[0]) is Plain
    with pytest.raises(ValueError, match="not built: model"):
        change(Subclassed())


@pytest.mark.parametrize("model", [None, "model", [Plain()], Plain])
@pytest.mark.parametrize("change", [convert_sync_batchnorm, revert_sync_batchnorm])
def test_what_is_no_model_is_refused(change, model):
    with pytest.raises(TypeError, match="must be a model or layer"):
        change(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "x"}, TypeError, "Received: name"),
        ({"axis": 1, "epsilon": 0.1}, TypeError, "Received: axis, epsilon"),
        ({"synchronized": True}, TypeError, "Received: synchronized"),
        ({"unknown": 1}, TypeError, "Received: unknown"),
        ({"renorm": True}, TypeError, "Received: renorm"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"communicator": "x"}, ValueError, "communicator='x'"),
        ({"communicator": 3}, TypeError, "communicator"),
        ({"momentum": 2.0}, ValueError, "momentum=2.0"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options, error, message):
    model = sequential()
    before = state(model)
    with pytest.raises(error, match=message):
        convert_sync_batchnorm(model, **options)
    assert state(model) == before


def test_a_layer_that_cannot_be_converted_leaves_the_model_as_it_was():
    layers = [Plain(name="good"), Plain(name="bad", epsilon=-1.0)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    before = state(model)
    with pytest.raises(ValueError, match="The layer bad cannot be converted: `epsilon` must not"):
        convert_sync_batchnorm(model)
    assert state(model) == before


def test_the_scope_of_another_strategy_is_refused(mirrored):
    model = sequential()
    before = state(model)
    with (
        mirrored(2).strategy.scope(),
        pytest.raises(RuntimeError, match="in the one in which it was built"),
    ):
        convert_sync_batchnorm(model)
    assert state(model) == before


def test_a_graph_is_refused():
    model = sequential()
    before = state(model)
    with pytest.raises(RuntimeError, match="eagerly only"):
        tf.function(lambda: convert_sync_batchnorm(model, return_conversion=True).converted)()
    assert state(model) == before
