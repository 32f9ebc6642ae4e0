"""What runs after a conversion is the layer's own call, whatever was on the object before."""

import copy
import pickle
import types
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.models.agreement import assert_synchronized
from syncbn._src.models.conversion import convert_sync_batchnorm, revert_sync_batchnorm
from tests.keras import KERAS_3, keras

Plain = keras.layers.BatchNormalization
Sync = syncbn.SyncBatchNormalization
keras_2 = pytest.mark.skipif(KERAS_3, reason="Keras 3 leaves no methods on objects")


def built(layer, shape=(None, 4, 4, 3)):
    layer.build(shape)
    rng = np.random.default_rng(0)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return layer


def data(*shape):
    return np.random.default_rng(1).normal(1, 2, size=shape or (8, 4, 4, 3)).astype("float32")


@keras_2
def test_a_method_that_writing_a_saved_model_left_on_a_layer_is_gone(tmp_path):
    layer = Plain(name="layer")
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    model.save(tmp_path / "plain", save_format="tf")
    assert "call" in vars(layer)
    for change, cls in (convert_sync_batchnorm, Sync), (revert_sync_batchnorm, Plain):
        assert change(model, return_conversion=True).converted == ("layer",)
        assert "call" not in vars(layer)
        assert layer.call.__func__ is cls.call
        model.save(tmp_path / cls.__name__, save_format="tf")
        model(data(), training=True)


@keras_2
def test_a_model_that_runs_traces_is_not_said_to_be_converted(tmp_path):
    class Unregistered(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = Plain(name="norm")

        def call(self, x, training=None):
            return self.norm(x, training=training)

    model = Unregistered()
    model(data())
    model.save(tmp_path / "model", save_format="tf")
    loaded = keras.models.load_model(tmp_path / "model")
    (reason,) = convert_sync_batchnorm(loaded, return_conversion=True).unchanged.values()
    assert "loaded from a SavedModel without its class" in reason
    assert "register_keras_serializable" in reason
    convert_sync_batchnorm(model)
    model.save(tmp_path / "converted", save_format="tf")
    Unregistered.__name__ = "Forgotten"  # as in another process
    with pytest.warns(UserWarning, match="was not restored: Unknown"):
        loaded = keras.models.load_model(tmp_path / "converted")
    with pytest.raises(ValueError, match="loaded from a SavedModel without its class"):
        assert_synchronized(loaded)


def test_a_call_of_ones_own_on_the_object_is_reported():
    layer = built(Plain(name="layer"))
    layer.call = types.MethodType(lambda self, x, training=None, mask=None: 2 * x, layer)
    result = convert_sync_batchnorm(layer, return_conversion=True)
    assert result.unchanged == {"layer": "is a BatchNormalization, with methods of its own: call"}
    assert type(layer) is Plain
    other = built(Sync(name="other"))
    assert_synchronized(other)
    other.call = layer.call
    with pytest.raises(ValueError, match=r"other, which overrides call"):
        assert_synchronized(other)


def test_one_normalization_that_is_never_called_does_not_keep_the_others():
    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.used, self.idle = Plain(name="used"), Plain(name="idle")

        def build(self, input_shape):
            self.used.build(input_shape)
            super().build(input_shape)

        def call(self, x, training=None):
            return self.used(x, training=training)

    model = Net()
    model(data())
    result = convert_sync_batchnorm(model, return_conversion=True)
    assert result.converted == ("used",)
    assert str(result) == (
        "net: 1 of 2 normalizations converted\n  idle: is not built, since it was never called. "
        "If it ever is, convert again"
    )
    model.idle(data())
    assert convert_sync_batchnorm(model, return_conversion=True).converted == ("idle",)


@pytest.fixture
def under_the_hosts_name():
    """As one does for other packages' code, which looks the class up when it makes its layers."""
    keras.layers.BatchNormalization = Sync
    yield
    keras.layers.BatchNormalization = Plain


def test_the_layer_can_stand_under_the_hosts_name(under_the_hosts_name, tmp_path):
    twin = built(Plain(name="layer"))
    model = keras.Sequential(
        [keras.Input((4, 4, 3)), keras.layers.BatchNormalization(name="layer")]
    )
    (layer,) = (one for one in model.layers if one.name == "layer")
    assert type(layer) is Sync
    layer.set_weights(twin.get_weights())
    x = data()
    np.testing.assert_array_equal(model(x), twin(x))
    model.save(tmp_path / "model.keras")
    for other in keras.models.load_model(tmp_path / "model.keras"), keras.models.clone_model(model):
        assert type(other.get_layer("layer")) is Sync
    assert syncbn.report(model)
    assert revert_sync_batchnorm(model, return_conversion=True).converted == ("layer",)
    assert type(layer) is Plain
    np.testing.assert_array_equal(model(x), twin(x))
    model.save(tmp_path / "plain.keras")
    assert type(keras.models.load_model(tmp_path / "plain.keras").get_layer("layer")) is Plain
    assert convert_sync_batchnorm(model, return_conversion=True).converted == ("layer",)
    np.testing.assert_allclose(
        model(x, training=True), twin(x, training=True), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(KERAS_3, reason="Keras 3 has no such option")
@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize(("shape", "axis"), [((8, 4, 4, 3), -1), ((8, 4, 4, 3), 1), ((8, 3), -1)])
def test_inference_runs_the_kernels_of_the_plain_layer(shape, axis, fused):
    if fused and len(shape) == 2:
        with pytest.raises(ValueError, match="fused=True"):
            built(Sync(fused=True), shape)
        return
    x, mask = data(*shape), np.ones(shape[:-1], bool)
    layer, twin = (built(cls(axis=axis, fused=fused), shape) for cls in (Sync, Plain))
    assert layer.fused == twin.fused
    np.testing.assert_array_equal(layer(x), twin(x))
    np.testing.assert_array_equal(layer(x, mask=mask), twin(x))
    kinds = [
        {op.type for op in tf.function(one).get_concrete_function(x).graph.get_operations()}
        for one in (layer, twin)
    ]
    assert ("FusedBatchNormV3" in kinds[0]) == ("FusedBatchNormV3" in kinds[1]) == bool(twin.fused)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
@pytest.mark.parametrize("momentum", [0.5, None])
@pytest.mark.parametrize("kind", ["made", "converted", "centering"])
def test_layers_can_be_copied_and_pickled(kind, momentum, copied):
    if kind == "made":
        layer = built(Sync(momentum=momentum, communicator="mpi", name="layer"))
    elif kind == "centering":
        layer = built(syncbn.SyncCentering(momentum=momentum, communicator="mpi", name="layer"))
    else:
        layer = built(Plain(name="layer"))
        convert_sync_batchnorm(layer, momentum=momentum, communicator="mpi")
    x = data()
    other = copied(layer)
    assert other.get_config() == layer.get_config()
    assert type(other) is type(layer)
    for one, two in zip(other.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(other(x), layer(x))
    statistics = [one for one in other.weights if not one.trainable]
    if KERAS_3 or copied is copy.deepcopy:  # a pickled variable of TensorFlow itself is a plain one
        for weight in statistics:
            value = weight.value if KERAS_3 else weight
            assert value.synchronization == tf.VariableSynchronization.ON_READ
    # They share nothing.
    other.set_weights([w + 1 for w in other.get_weights()])
    assert not np.array_equal(layer.get_weights()[-1], other.get_weights()[-1])


@pytest.mark.parametrize("converted", [False, True])
def test_float16_parameters_over_several_replicas(mirrored, converted):
    """Parameters (those of Keras 3) and inputs are float16, statistics are float32."""
    strategy = mirrored(2).strategy
    x = data(8, 3)
    with strategy.scope():
        layer = (Plain if converted else Sync)(momentum=0.0, dtype="float16")
        layer.build((None, 3))
    if converted:
        convert_sync_batchnorm(layer)
    assert tf.as_dtype(layer.gamma.dtype) == (tf.float16 if KERAS_3 else tf.float32)
    halves = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(np.split(x, 2)[context.replica_id_in_sync_group], "float16")
    )
    outputs = strategy.run(lambda x: layer(x, training=True), args=[halves])
    given = x.astype("float16").astype("float64")
    truth = (given - given.mean(0)) / np.sqrt(given.var(0) + 1e-3)
    outputs = np.concatenate([y.numpy() for y in strategy.experimental_local_results(outputs)])
    assert outputs.dtype == np.float16
    np.testing.assert_allclose(outputs, truth, rtol=2e-3, atol=2e-3)
    for name, expected in ("moving_mean", given.mean(0)), ("moving_variance", given.var(0)):
        statistic = getattr(layer, name)
        np.testing.assert_allclose(np.asarray(statistic.numpy()), expected, rtol=2e-3)


@keras.utils.register_keras_serializable(package="tests")
class WithoutBuild(keras.layers.Layer):
    """What is in it is built when it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(x, training=training)


class Unregistered(keras.Model):
    registry: ClassVar[list] = []

    def __init_subclass__(cls, *, tag, **kwargs):
        Unregistered.registry.append(tag)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(x, training=training)


def test_a_layer_without_a_build_of_its_own_comes_back_converted(tmp_path):
    model = keras.Sequential([keras.Input((3,)), WithoutBuild(), keras.layers.Dense(2)])
    convert_sync_batchnorm(model)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for again in keras.models.load_model(tmp_path / "model.keras"), clone:
        assert isinstance(again.layers[0].norm, Sync)
        np.testing.assert_array_equal(again(x), model(x))


def test_a_class_that_is_not_registered_comes_back_from_its_own_config():
    model = Unregistered()
    model(tf.ones([2, 3]))
    convert_sync_batchnorm(model)
    assert Unregistered.registry == []
    again = type(model).from_config(model.get_config())
    again(tf.ones([2, 3]))
    assert isinstance(again.norm, Sync)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.skipif(KERAS_3, reason="Keras 3 has no other class of this name")
def test_a_class_of_this_name_that_a_user_names_is_the_one_that_is_loaded(tmp_path):
    class SyncBatchNormalization(keras.layers.BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((3,)), SyncBatchNormalization()])
    for path in tmp_path / "m.h5", tmp_path / "m.keras":
        model.save(path)
        objects = {"SyncBatchNormalization": SyncBatchNormalization}
        loaded = keras.models.load_model(path, custom_objects=objects)
        assert type(loaded.layers[0]) is SyncBatchNormalization
