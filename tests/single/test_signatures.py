"""What others learn of the layers by inspecting them, as wrappers do."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.util import tf_inspect

import syncbn
from syncbn._src.call_stack import callers
from tests import oracle
from tests.keras import KERAS_3, keras

BOTH = pytest.mark.parametrize("make", [syncbn.SyncBatchNormalization, syncbn.SyncCentering])
CALL = ["self", "inputs", "training", "mask", "update_moving_statistics"]


@BOTH
@pytest.mark.parametrize("bound", [False, True])
def test_call_shows_its_arguments(make, bound):
    call = make().call if bound else make.call
    for getfullargspec in (inspect.getfullargspec, tf_inspect.getfullargspec):
        spec = getfullargspec(call)
        assert (spec.args, spec.varargs, spec.varkw) == (CALL, None, None)
        assert spec.defaults == (None, None, True)
    assert list(inspect.signature(call).parameters) == CALL[bound:]


def test_a_distributed_optimizer_shows_its_arguments():
    optimizer = syncbn.training.distribute(keras.optimizers.SGD())
    if KERAS_3:
        assert inspect.getfullargspec(optimizer.apply).args == [
            "self",
            "grads",
            "trainable_variables",
        ]
    else:
        spec = inspect.getfullargspec(optimizer.apply_gradients)
        assert (spec.args, spec.varkw) == (["self", "grads_and_vars"], "kwargs")


def test_nothing_hides_its_arguments():
    package = Path(syncbn.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "do_not_convert" in path.read_text()]
    assert users == ["autograph.py"]


@BOTH
def test_autograph_leaves_call_alone(make):
    class Recorder(syncbn.LocalCommunicator):
        def all_reduce_sum(self, tensor, name):
            found.extend(callers())
            return tensor

    found = []
    layer = make(communicator=Recorder())
    layer.build((None, 3))
    tf.function(lambda: layer(tf.ones([2, 3]), training=True))()
    assert ("syncbn._src.layers.synchronized_layer", "call") in found
    assert not any(name == "tf__call" for _, name in found)


@BOTH
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 2, 5, 3)])
@pytest.mark.parametrize("batch", [6, None])
def test_time_distributed_passes_the_mask_on(make, shape, batch):
    if not KERAS_3 and make is syncbn.SyncCentering and batch:
        pytest.skip("Keras 2 gives layers that are not its own no mask where it knows the batch")
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=shape).astype("float32")
    mask = rng.random(shape[:2]) < 0.6
    x[~mask] = 100.0
    layer = make(momentum=0.0)
    wrapper = keras.layers.TimeDistributed(layer)
    wrapper.build(shape)
    specs = [tf.TensorSpec([batch, *shape[1:]]), tf.TensorSpec([batch, shape[1]], tf.bool)]
    call = tf.function(lambda x, mask: wrapper(x, training=True, mask=mask), specs)
    y = call(x, mask)
    # Keras 3 calls the layer once for each step, Keras 2 once for all.
    steps = [np.s_[:, step] for step in range(shape[1])] if KERAS_3 else [np.s_[:]]
    for step in steps:
        seen = x[step][mask[step]].astype("float64").reshape(-1, 3)
        expected = x[step] - seen.mean(0)
        if make is syncbn.SyncBatchNormalization:
            expected = expected / np.sqrt(seen.var(0) + 1e-3)
        np.testing.assert_allclose(y[step], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(layer.moving_mean, seen.mean(0), rtol=1e-6)


@BOTH
@pytest.mark.parametrize("axis", [-1, 1])
def test_a_mask_of_the_first_dimensions(make, axis):
    shape = (5, 4, 6, 3)
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, *shape))
    mask = rng.random(shape[:2]) < 0.6
    mask[0] = True
    layer = make(axis=axis, dtype="float64")
    layer.build(shape)
    with tf.GradientTape() as tape:
        inputs = tf.constant(x)
        tape.watch(inputs)
        y = layer(inputs, training=True, mask=mask)
    dx = tape.gradient(y, inputs, tf.constant(dy))
    whole = np.broadcast_to(mask[..., None], shape[:-1])
    if make is syncbn.SyncCentering:
        truth = oracle.centering(x, dy, axis=axis, mask=whole)
    else:
        truth = oracle.batch_normalization(x, dy, 1.0, 0.0, axis=axis, mask=whole)
    np.testing.assert_allclose(y, truth.y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dx, truth.dx, rtol=1e-9, atol=1e-9)


class Asking(keras.layers.Wrapper):
    """Tells its layer of training if that has such an argument, as wrappers for pruning do."""

    def call(self, inputs, training=None):
        if "training" in tf_inspect.getfullargspec(self.layer.call).args:
            return self.layer.call(inputs, training=training)
        return self.layer.call(inputs)


@BOTH
def test_a_wrapper_that_asks_for_training_trains(make):
    layer = make(momentum=0.0)
    layer.build((None, 3))
    x = np.random.default_rng(2).normal(5, 1, size=(8, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), Asking(layer), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, x, batch_size=8, verbose=0)
    np.testing.assert_allclose(layer.moving_mean, x.mean(0), rtol=1e-6)


def pruned(model):
    """Returns a copy with wrappers around layers of known classes, as packages for pruning do."""
    known = (keras.layers.BatchNormalization, keras.layers.Dense)

    def wrapped(layer):
        if type(layer) not in known:
            raise ValueError(f"{type(layer)} is not supported")
        return Asking(type(layer).from_config(layer.get_config()))

    return keras.models.clone_model(model, clone_function=wrapped)


def test_what_knows_layers_by_their_class_is_given_plain_ones(mirrored):
    x = np.random.default_rng(3).normal(5, 1, size=(8, 3)).astype("float32")
    with mirrored(2).strategy.scope():
        plain = keras.layers.BatchNormalization(momentum=0.0)
        model = keras.Sequential([keras.Input((3,)), plain, keras.layers.Dense(1)])
        syncbn.convert_sync_batchnorm(model)
        with pytest.raises(ValueError, match="SyncBatchNormalization'> is not supported"):
            pruned(model)
        syncbn.revert_sync_batchnorm(model)
        copy = pruned(model)
        assert len(syncbn.convert_sync_batchnorm(copy, return_conversion=True).converted) == 1
        copy.compile(keras.optimizers.SGD(0.0), "mse")
    copy.fit(x, x[:, :1], batch_size=8, verbose=0)
    syncbn.assert_synchronized(copy)
    ((mean, variance, _),) = syncbn.moving_statistics(copy).values()
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype("float64").var(0), rtol=1e-5)
