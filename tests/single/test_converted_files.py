"""A converted model stays synchronized, and equal, through every way of saving and copying it.

The table: each way, converted before or after, each kind of model, in both Kerases.
"""

import copy
import pickle

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from syncbn._src.keras_compat import keras_api
from syncbn._src.keras_compat.layer_names import named_layers
from syncbn._src.models.conversion import convert_sync_batchnorm, revert_sync_batchnorm
from tests.keras import KERAS_3, keras

Plain = keras.layers.BatchNormalization
Sync = syncbn.SyncBatchNormalization
registered = keras.utils.register_keras_serializable("test_converted_files")


def inputs():
    return keras.Input((4, 4, 3))


def head(x):
    return keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling2D()(x))


def functional():
    x = first = inputs()
    shared = Plain(name="shared")
    return keras.Model(first, head(shared(keras.layers.Dense(3)(shared(x)))), name="functional")


def nested():
    inner = keras.Sequential([keras.Input((4, 4, 3)), Plain(name="bn")], name="inner")
    deeper = keras.Sequential([keras.Input((4, 4, 3)), inner, Plain(axis=1)], name="deeper")
    x = first = inputs()
    return keras.Model(first, head(deeper(x)), name="nested")


@registered
class Block(keras.layers.Layer):
    """A layer whose normalizations are made by its constructor, or by `build`, and in a list."""

    def __init__(self, width, late=False, **kwargs):
        super().__init__(**kwargs)
        self.width, self.late = width, late
        if not late:
            self.make()

    def make(self):
        self.parts = [keras.layers.Dense(self.width), Plain(), Plain(momentum=0.5)]

    def build(self, input_shape):
        if self.late:
            self.make()
        shape = input_shape
        for part in self.parts:
            with tf.name_scope(part.name):  # Keras 2 names weights by it
                part.build(shape)
            shape = (*shape[:-1], self.width)
        super().build(input_shape)

    def call(self, x, training=None):
        dense, *norms = self.parts
        x = dense(x)
        for norm in norms:
            x = norm(x, training=training)
        return x

    def get_config(self):
        return {**super().get_config(), "width": self.width, "late": self.late}


def with_blocks():
    x = first = inputs()
    x = Block(5, name="early")(x)
    x = keras.layers.Dense(3)(Plain(name="between")(x))
    return keras.Model(first, head(Block(4, late=True, name="late")(x)), name="with_blocks")


@registered
class Subclassed(keras.Model):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.norm = Plain()
        self.block = Block(width)
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.dense = keras.layers.Dense(2)

    def call(self, x, training=None):
        x = self.block(self.norm(x, training=training), training=training)
        return self.dense(self.pool(x))

    def get_config(self):
        return {"width": self.width}


def subclassed():
    model = Subclassed(3)
    model(data())
    return model


@registered
class Backbone(keras.Model):
    """A functional model that makes itself anew from a config of its own, as keras-hub's do."""

    def __init__(self, width=4, **kwargs):
        x = first = inputs()
        x = Plain(momentum=0.9, name="first")(keras.layers.Dense(width)(x))
        super().__init__(inputs=first, outputs=head(Block(width)(x)), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def rebuilding():
    return Backbone(5, name="backbone")


def around_rebuilding():
    x = first = inputs()
    dense = keras.layers.Dense(3, name="outer")(Backbone(5, name="backbone")(x))
    return keras.Model(first, dense, name="around_rebuilding")


MODELS = [functional, nested, with_blocks, subclassed, rebuilding, around_rebuilding]
every_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def data():
    return np.random.default_rng(1).normal(1, 2, size=(8, 4, 4, 3)).astype("float32")


def made(build):
    model, rng = build(), np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


def normalizations(model):
    layers = [model, *named_layers(model).values()]
    return [layer for layer in layers if isinstance(layer, keras_api.BATCH_NORMALIZATION)]


# The ways: each takes a model and a function that builds an equal one, and gives another model.


def keras_file(model, build, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def h5_file(model, build, folder):
    model.save(folder / "model.h5")
    return keras.models.load_model(folder / "model.h5")


def saved_model(model, build, folder):
    model.save(folder / "model", save_format="tf")
    return keras.models.load_model(folder / "model")


def clone(model, build, folder):
    other = keras.models.clone_model(model)
    if not other.built:
        other(data())
    other.set_weights(model.get_weights())
    return other


def own_config(model, build, folder):
    config = keras.utils.serialize_keras_object(model)
    other = keras.utils.deserialize_keras_object(config)
    if not other.built:
        other(data())
    other.set_weights(model.get_weights())
    return other


def deep_copy(model, build, folder):
    return copy.deepcopy(model)


def pickled(model, build, folder):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 (its own)


def weights_file(model, build, folder):
    model.save_weights(folder / "model.weights.h5")
    other = build()
    other.load_weights(folder / "model.weights.h5")
    return other


def checkpoint(model, build, folder):
    path = tf.train.Checkpoint(model=model).save(str(folder / "checkpoint"))
    other = build()
    tf.train.Checkpoint(model=other).restore(path).expect_partial()
    return other


def export(model, build, folder):
    model.export(str(folder / "exported"))
    served = tf.saved_model.load(str(folder / "exported"))
    return lambda x: served.serve(x)  # and keep what it uses


def tflite(model, build, folder):
    if KERAS_3:
        model.export(str(folder / "exported"))
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "exported"))
    else:
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
    interpreter = tf.lite.Interpreter(model_content=converter.convert())

    def run(x):
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, x)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


COPIES = [keras_file, h5_file, clone, own_config, deep_copy, pickled, weights_file, checkpoint]
if not KERAS_3:
    COPIES.append(saved_model)  # Keras 3 writes SavedModels by export only
EXPORTS = [export, tflite]

# Where Keras itself refuses, of a plain model too, and names another way.
unknown = (ValueError, "Unknown layer.*custom_object_scope")
if KERAS_3:
    REFUSED = {(subclassed, h5_file): unknown, (rebuilding, h5_file): unknown}
else:
    subclasses = (NotImplementedError, "save_weights")
    REFUSED = {(subclassed, h5_file): subclasses, (rebuilding, h5_file): unknown}


@pytest.fixture
def collectives(monkeypatch):
    """Says which layers asked for a collective: the names of what was added up."""
    asked = []

    class Recording:
        name, size, rank, supports_jit = "recording", 2, 0, False

        def all_reduce_sum(self, tensor, name):
            asked.append(name)
            return 2 * tensor

    monkeypatch.setattr("syncbn._src.layers.synchronized_layer.resolve", lambda given: Recording())
    return asked


def assert_synchronized_and_equal(model, twin, collectives):
    """``twin`` is the plain model."""
    x = data()
    np.testing.assert_allclose(model(x), twin(x), rtol=1e-5, atol=1e-6)
    for one, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {type(layer) for layer in normalizations(model)} == {Sync}
    # All that the layers do in training goes through their communicators; a batch twice is the
    # batch, for the outputs.
    collectives.clear()
    outputs = model(x, training=True)
    calls = len(normalizations(twin)) + ("shared" in [one.name for one in normalizations(twin)])
    assert len(collectives) == calls
    np.testing.assert_allclose(outputs, twin(x, training=True), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("way", COPIES, ids=lambda way: way.__name__)
@every_model
def test_what_comes_back_is_synchronized_and_equal(build, way, collectives, tmp_path):
    def converted():
        model = made(build)
        assert not convert_sync_batchnorm(
            model, communicator="mpi", return_conversion=True
        ).unchanged
        return model

    if (build, way) in REFUSED:
        error, remedy = REFUSED[build, way]
        for model in made(build), converted():
            with pytest.raises(error, match=remedy):
                way(model, converted, tmp_path)
        return

    model = converted()
    other = way(model, converted, tmp_path)
    assert other is not model
    assert {layer.communicator for layer in normalizations(other)} == {"mpi"}
    for one in model, other:
        assert_synchronized_and_equal(one, made(build), collectives)
    again = way(other, converted, tmp_path)
    revert_sync_batchnorm(again)
    assert {type(layer) for layer in normalizations(again)} == {Plain}

    model = made(build)
    other = way(model, lambda: made(build), tmp_path)
    assert type(other) is type(again)
    for one in model, other:
        assert not convert_sync_batchnorm(one, return_conversion=True).unchanged
        assert_synchronized_and_equal(one, made(build), collectives)


@every_model
def test_a_converted_model_is_an_instance_of_the_class_that_it_was_of(build):
    model = made(build)
    own = type(model)
    convert_sync_batchnorm(model)
    assert isinstance(model, own)
    # What Keras makes of its config has the layers there.
    assert (type(model) is own) == own.__module__.startswith(("keras.", "tf_keras."))
    assert type(model).__name__ == own.__name__
    revert_sync_batchnorm(model)
    assert type(model) is own


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("way", EXPORTS, ids=lambda way: way.__name__)
@every_model
def test_what_is_exported_is_equal_and_leaves_the_model_as_it_is(build, way, collectives, tmp_path):
    twin, x = made(build), data()
    expected = twin(x)
    for convert_first in True, False:
        model = made(build)
        if convert_first:
            convert_sync_batchnorm(model)
        served = way(model, None, tmp_path / str(convert_first))
        np.testing.assert_allclose(served(x), expected, rtol=1e-5, atol=1e-6)
        if not convert_first:
            assert not convert_sync_batchnorm(model, return_conversion=True).unchanged
        assert_synchronized_and_equal(model, made(build), collectives)
        # And back.
        revert_sync_batchnorm(model)
        np.testing.assert_allclose(model(x, training=True), made(build)(x, training=True))
