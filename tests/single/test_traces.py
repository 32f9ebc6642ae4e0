"""Which traces communicate: those that train, whatever a function is called, and no others."""

import numpy as np
import pytest
import tensorflow as tf

import syncbn
from tests.keras import KERAS_3, keras

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
OTHER = np.random.default_rng(1).normal(7, 2, size=(5, 3))


class Another(syncbn.LocalCommunicator):
    """Joins a second replica, which has the batch `OTHER`."""

    size = 2
    finds_mixups = True  # there is no other side

    def __init__(self):
        self.calls = 0

    def all_reduce_sum(self, tensor, name):
        self.calls += 1
        sums = [[len(OTHER)], OTHER.sum(0), np.square(OTHER).sum(0)]
        return tensor + np.concatenate(sums)[: tensor.shape.num_elements()]


@BOTH
@pytest.mark.parametrize(
    "name",
    [
        "my_layer_call_fn",
        "my_layer_call_and_return_conditional_losses",
        "scratch_graph",
        "keras_scratch_graph",
        "_infer_output_signature",
        "compute_output_shape",
        "compute_output_spec",
        "build",
        "save_impl",
    ],
)
def test_the_name_of_a_function_changes_nothing(make, name):
    layer = make(momentum=0.0, communicator=Another())
    layer.build((None, 3))
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")

    def step():
        return layer(x, training=True)

    step.__name__ = name
    step.__code__ = step.__code__.replace(co_name=name)
    tf.function(step)()
    np.testing.assert_allclose(layer.moving_mean, np.concatenate([x, OTHER]).mean(0), rtol=1e-6)


class Nested(keras.layers.Layer):
    """Trains whoever calls it, with a layer that Keras tracks and one that it does not."""

    def __init__(self, make, **kwargs):
        super().__init__(**kwargs)
        self.communicator = Another()
        self.tracked = make(communicator=self.communicator)
        layer = make(communicator=self.communicator)
        self.hidden = lambda: layer

    def build(self, shape):
        for layer in (self.tracked, self.hidden()):
            layer.build((None, 3))
        self.built = True

    def call(self, x, training=None):
        return self.hidden()(self.tracked(x, training=True), training=True)

    def unmoved(self):
        layers = (self.tracked, self.hidden())
        return self.communicator.calls == 0 and not any(np.any(one.moving_mean) for one in layers)


@BOTH
def test_a_functional_model_is_built_without_a_replica_knowing(make):
    nested = Nested(make)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, nested(inputs))
    keras.models.clone_model(model, clone_function=lambda layer: layer)
    keras.layers.TimeDistributed(nested.tracked)(keras.Input((4, 3)), training=True)
    assert nested.unmoved()


@BOTH
def test_shapes_are_inferred_without_a_replica_knowing(make):
    nested = Nested(make)
    if KERAS_3:
        shape = nested.compute_output_spec(keras.KerasTensor((2, 3))).shape
    else:
        shape = nested.compute_output_shape((2, 3))
    assert tuple(shape) == (2, 3)
    assert nested.unmoved()


@BOTH
def test_a_subclassed_model_is_built_without_a_replica_knowing(make):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.nested = Nested(make)

        def build(self, shape):
            super().build(shape) if not KERAS_3 else self.nested.build(shape)

        def call(self, x, training=None):
            return self.nested(x, training=training)

    model = Model()
    model.build((None, 3))
    assert model.nested.unmoved()
    model.compile("sgd", "mse")
    x = np.ones((4, 3), "float32")
    model.evaluate(x, x, verbose=0)
    # Now it trains, if only in `evaluate`.
    assert model.nested.communicator.calls > 0


@pytest.mark.skipif(KERAS_3, reason="Keras 3 does not trace layers in training when it saves")
@BOTH
@pytest.mark.parametrize("save", [keras.Model.save, tf.saved_model.save], ids=["keras", "tf"])
def test_a_saved_model_folder_is_written_without_a_replica_knowing(make, save, tmp_path):
    nested = Nested(make)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, nested(inputs))
    # The variables of a layer that Keras does not track would be missing.
    nested.hidden = lambda: keras.layers.Activation("linear")
    save(model, str(tmp_path / "folder"))
    assert nested.communicator.calls == 0
    assert not np.any(nested.tracked.moving_mean)
